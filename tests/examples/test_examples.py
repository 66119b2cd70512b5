"""The programs in examples/ run as they stand."""

from __future__ import annotations

import runpy

import pytest
import torch

import mpass
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_python
from tests.helpers.toys import tiny_llama

EXAMPLES = ROOT / "examples"
WORDS = [f"w{i}" for i in range(61)]


def save_tiny_llama(folder):
    """A tiny Llama with random weights and a tokenizer of one token per word, in a folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 4096}
    tiny_llama(**sizes, eos_token_id=None).save_pretrained(folder)


@pytest.fixture
def llama_folder(tmp_path):
    save_tiny_llama(tmp_path)
    return tmp_path


@pytest.fixture
def fresh(monkeypatch):
    """Nothing compiled before, and Inductor left out: the examples name no inner backend."""
    torch._dynamo.reset()
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, *_, **__: gm.forward)
    yield
    torch._dynamo.reset()


def run(name, *arguments):
    """The example's main, under a name of its own."""
    namespace = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    namespace["main"](*map(str, arguments))


def text_file(path, words):
    path.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(words)))
    return path


@pytest.mark.usefixtures("fresh")
def test_searched_config_example_searches_and_compiles(llama_folder, tmp_path, capsys):
    config = tmp_path / "found.json"
    text = text_file(tmp_path / "text.txt", 1100)
    run("searched_config", llama_folder, text, config, 512)
    assert mpass.SparseConfig.load(config).num_layers == 2
    assert {site.config_source for site in mpass.last_report().sites} == {"options['config']"}
    assert "layer" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh")
def test_second_turn_example_attends_to_the_cache_sparse(llama_folder, tmp_path, capsys):
    first, second = text_file(tmp_path / "1.txt", 2100), text_file(tmp_path / "2.txt", 200)
    run("second_turn", llama_folder, first, second)
    printed = capsys.readouterr().out
    assert "layer 0: 2100 queries, 2100 keys" in printed
    assert "layer 1: 200 queries, 2300 keys" in printed


@pytest.mark.usefixtures("fresh")
def test_denoising_example_is_closer_with_the_residual(capsys):
    run("denoising", 640, 6)
    shown = capsys.readouterr().out
    errors = [float(line.rsplit(" ", 1)[1]) for line in shown.splitlines() if "relative" in line]
    assert errors[0] < errors[1] / 2
    assert "2 of 2 attention layers" in shown


@pytest.mark.usefixtures("fresh")
def test_encoder_example_is_sparse_without_causality(capsys):
    run("encoder", 1024)
    printed = capsys.readouterr().out
    assert "2 of 2 attention layers, block_sparse" in printed
    assert float(printed.rsplit(" ", 1)[1]) < 0.5


@pytest.mark.usefixtures("fresh")
def test_own_pattern_example_computes_what_it_selects(capsys):
    from mpass.patterns.base import registry

    known = dict(registry._registry)
    try:
        run("own_pattern", 1024)
        share = float(capsys.readouterr().out.rsplit(" ", 1)[1].strip("%\n")) / 100
        assert 0.25 < share < 0.40
        from mpass.inspection.pattern_check import check_pattern

        found = list(check_pattern(registry._registry["comb"]))
        assert found and [check.fault for check in found if check.fault] == []
    finally:
        registry._registry.clear()
        registry._registry.update(known)


NEED_MORE = {"vllm_offline"}
"""Examples that need a GPU and vLLM, which no test here has."""


def test_every_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    assert {name for name in names if any(name in text for text in tests)} == names
    assert {n for n in names if any(f"examples/{n}.py" in text for text in pages)} == names


def test_prefill_example_runs_sparse_and_generates(llama_folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(2100)))
    torch._dynamo.reset()
    known = {id(report) for report in mpass.reports()}
    runpy.run_path(str(EXAMPLES / "prefill.py"))["main"](str(llama_folder), str(prompt))
    prefill = next(report for report in mpass.reports() if id(report) not in known)
    assert [site.status for site in prefill.sites] == ["sparse", "sparse"]
    assert [site.layer for site in prefill.sites] == [0, 1]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("next: ")
    assert len(printed[-1].split()) == 16


def write_prompt(path, tokens):
    path.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(tokens)))
    return str(path)


def test_continuous_batching_example_answers_each_prompt(llama_folder, tmp_path, capsys):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    files = [write_prompt(tmp_path / f"{n}.txt", n) for n in (30, 2100, 200)]
    example = runpy.run_path(str(EXAMPLES / "continuous_batching.py"))
    try:
        example["main"](str(llama_folder), *files)
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed] == files
    assert all(len(line.partition(": ")[2].split()) == 16 for line in printed)


def test_tensor_parallel_example_is_sparse_on_two_ranks(llama_folder, tmp_path):
    prompt = write_prompt(tmp_path / "prompt.txt", 2100)
    config = tmp_path / "heads.json"
    mpass.SparseConfig(layers={"0-1": [f"a_shape({n}, 64)" for n in range(4)]}).save(config)
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc_per_node", "2", str(EXAMPLES / "tensor_parallel.py")),
        *(str(llama_folder), prompt, str(config)),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    assert "next: " in done.stdout
    assert "2 of 2 attention layers, a_shape, prompts" in done.stdout


def test_client_example_asks_about_each_file(tmp_path, capsys):
    """Against a stand-in for the server, which answers with the last line of the prompt."""
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            answer = f"{self.path} {prompt.splitlines()[0]} {prompt.splitlines()[-1]}"
            found = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *arguments):
            pass

    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(f"text of {file.name}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        example = runpy.run_path(str(EXAMPLES / "ask_server.py"))
        example["main"](f"http://127.0.0.1:{server.server_port}", "Why?", *map(str, files))
    finally:
        server.shutdown()
        server.server_close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in printed] == [
        f"/v1/chat/completions text of {file.name} Why?" for file in files
    ]


@pytest.mark.usefixtures("fresh")
def test_train_dma_example_trains_through_the_keys_that_it_keeps(capsys):
    run("train_dma", 2, 150)
    printed = capsys.readouterr().out
    assert "step 2: loss" in printed and "of the answers right" in printed
    sites = mpass.last_report().sites
    assert [set(site.patterns) for site in sites] == [{"dynamic_mask(64)"}] * 2
    assert all(site.training for site in sites)
