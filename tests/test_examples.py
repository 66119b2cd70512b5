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
