"""The real vLLM: SmolLM2 offline and through the HTTP server, on this machine's CPU.

`make vllm` sets up a Python of its own for vLLM and runs these tests, which are marked `vllm`. Each
engine is a process that ends with its test. Prompts are short and the shortest sparse prompt is
shorter, so that an engine is started, asked and ended within minutes on two cores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mpass.config import SparseConfig
from mpass.models.load import load_model, load_tokenizer, model_folder
from mpass.models.texts import find_text, load_tokens
from tests.helpers.paths import ROOT
from tests.serving.vllm.engine_program import ENVIRONMENT, RESULT

PYTHON = Path(os.environ.get("MPASS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM's Python: make vllm"),
]

DTYPE = torch.float32
"""Tokens of different programs can be compared: no rounding parts them this early."""

LENGTH, TOKENS = 12 * 128, 6
"""Whole pages of a cache: a repeated prompt then has one page of queries left, enough to be sparse.
Of fewer queries the attention would be dense, and the tokens others."""

SETTINGS = {"pattern": "a_shape(64, 256)", "min_seq_len": 512, "dense_above": 1.0}
"""Looks at a few hundred keys of each query, so that dense attention gives other tokens. It looks
at no input, so that chunks of a prompt are parts of the same attention."""

WHOLE = {"max_num_batched_tokens": 4096, "enable_chunked_prefill": False}
CHUNKS = {"max_num_batched_tokens": 640, "enable_chunked_prefill": True}

SECONDS = 1500
"""Until a process is taken to hang; a busy machine needs minutes to start an engine."""


@pytest.fixture(scope="module")
def folder() -> str:
    return str(model_folder("smollm2", dtype=DTYPE))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    tokenizer = load_tokenizer("smollm2", dtype=DTYPE)
    return load_tokens(find_text("code").read(), tokenizer, 2 * LENGTH)[0].tolist()


@pytest.fixture(scope="module")
def expected(ids) -> list[int]:
    """Greedy tokens of the first LENGTH tokens by transformers' model, compiled by mpass."""
    model, _ = load_model("smollm2", dtype=DTYPE)
    model.compile(
        backend="minference", dynamic=True, options={**SETTINGS, "inner_backend": "eager"}
    )
    found = list(ids[:LENGTH])
    with torch.no_grad():
        out = model(torch.tensor([found]), use_cache=True, logits_to_keep=1)
        for _ in range(TOKENS):
            found.append(int(out.logits[0, -1].argmax()))
            out = model(
                torch.tensor([found[-1:]]), past_key_values=out.past_key_values, logits_to_keep=1
            )
    return found[LENGTH:]


def run_engine(folder, batches, settings=SETTINGS, check=True, **engine):
    """What engine_program.py prints of an engine with these arguments."""
    engine = {
        "dtype": "float32",
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "additional_config": {"minference": settings},
        **engine,
    }
    job = {"model": folder, "engine": engine, "batches": batches}
    program = ROOT / "tests" / "serving" / "vllm" / "engine_program.py"
    done = subprocess.run(
        [str(PYTHON), str(program), json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd="/",
    )
    if not check:
        return done
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def batch(*prompts, tokens=TOKENS):
    return {"prompts": list(prompts), "tokens": tokens}


def test_whole_prompts_alone_and_in_a_mixed_batch(folder, ids, expected):
    short, other = ids[:100], ids[200:400]
    found = run_engine(
        folder, [batch(ids[:LENGTH]), batch(short, ids[:LENGTH], other), batch(short)], **WHOLE
    )
    alone, mixed, after = found
    assert alone["tokens"] == [expected]
    assert mixed["tokens"][1] == expected and mixed["tokens"][0] == after["tokens"][0]
    counts = after["counts"][0]
    assert counts["sparse"] == 2 * 30 and counts["prefills"] == 2
    assert counts["gathered"] == counts["failed"] == 0


def test_chunks_and_a_cached_prefix(folder, ids, expected):
    tail = ids[:1024] + ids[LENGTH : LENGTH + 384]
    found = run_engine(
        folder,
        [batch(ids[:LENGTH]), batch(tail), batch(ids[:LENGTH]), batch(tail, ids[:100])],
        enable_prefix_caching=True,
        **CHUNKS,
    )
    assert found[0]["tokens"] == [expected]
    assert found[2]["tokens"] == [expected]
    assert [one["cached"][0] for one in found] == [0, 1024, LENGTH - 128, 1280]
    assert found[1]["tokens"][0] == found[3]["tokens"][0]
    assert found[-1]["counts"][0]["gathered"] > 30


def test_a_config_of_another_model_ends_the_start_with_our_error(folder):
    settings = {"config": {"num_layers": 12, "num_heads": 9}}
    done = run_engine(folder, [], settings=settings, check=False, **WHOLE)
    assert done.returncode != 0
    assert "ConfigMismatchError" in done.stderr and "12 layers" in done.stderr


@pytest.mark.parametrize("ranks", [3])
def test_every_rank_takes_its_own_heads(folder, ids, tmp_path, ranks):
    patterns = [f"a_shape(64, {64 * (head + 1)})" for head in range(9)]
    config = tmp_path / "config.json"
    SparseConfig(layers={"0-29": patterns}, num_layers=30, num_heads=9).save(config)
    settings = {"config": str(config), "min_seq_len": 512, "dense_above": 1.0}
    one, several = (
        run_engine(
            folder,
            [batch(ids[:1000])],
            settings=settings,
            tensor_parallel_size=size,
            **WHOLE,
        )[0]
        for size in (1, ranks)
    )
    assert several["tokens"] == one["tokens"]
    assert [counts["sparse"] for counts in several["counts"]] == [30] * ranks


@contextmanager
def server(folder: str, metrics: Path, settings: dict) -> Iterator[str]:
    """vLLM's HTTP server on a free port of this machine; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "--model": folder,
        "--served-model-name": "smollm2",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "2048",
        "--max-num-seqs": "4",
        "--additional-config": json.dumps({"minference": settings}),
    }
    flat = [word for pair in arguments.items() for word in pair]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    log = metrics / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *flat, "--enforce-eager"],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd="/",
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + SECONDS
        while not is_up(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def complete(address: str, prompt: list[int]) -> list[int]:
    """Greedy tokens by the server's completions."""
    body = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def test_the_http_server_answers_sparse_and_shows_the_counts(folder, ids, expected, tmp_path):
    with server(folder, tmp_path, SETTINGS) as address:
        assert complete(address, ids[:LENGTH]) == expected
        assert len(complete(address, ids[:50])) == TOKENS
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
    assert "mpass:sparse_total 30.0" in metrics
    assert "layers 0-29 are sparse from 512 keys on" in (tmp_path / "server.log").read_text()
