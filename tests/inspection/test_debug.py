"""The debug folder, the log, the structured trace: what they show, and that they change nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch

import mpass
from mpass import debug
from tests.helpers.processes import run_python
from tests.helpers.toys import Attention, Decoder, compile_toy

PATTERN = mpass.AShape(16, 64)
FILES = {
    "captured.py",
    "matched.txt",
    "matched.json",
    "rewritten.py",
    "repro.py",
    "inputs.pt",
    "ops_diff.txt",
    "report.txt",
    "config.json",
    "timings.json",
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo", "fresh_debug_warnings")


@torch.no_grad()
def run(options=None, depth=2, **kwargs):
    options = {"pattern": PATTERN, "dense_above": 2.0} | (options or {})
    torch.manual_seed(1)
    model, x = Decoder(depth=depth).eval(), torch.randn(1, 300, 32)
    return compile_toy(model, options, **kwargs)(x)


def test_folder_holds_every_stage(tmp_path):
    run({"debug": tmp_path}, dynamic=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"000"}
    folder = tmp_path / "000"
    assert {path.name for path in folder.iterdir()} == FILES
    captured, rewritten = ((folder / f"{s}.py").read_text() for s in ("captured", "rewritten"))
    assert captured.count("torch._C._nn.scaled_dot_product_attention(") == 2
    assert "minference" not in captured
    assert rewritten.count("torch.ops.minference.sparse_attention.default(") == 2
    assert rewritten.count("torch.ops.minference.a_shape.default(") == 2
    compile(captured, "captured", "exec")
    compile(rewritten, "rewritten", "exec")
    differences = (folder / "ops_diff.txt").read_text()
    assert "minference.sparse_attention.default: 0 -> 2 (+2)" in differences
    assert "torch._C._nn.scaled_dot_product_attention: 2 -> 0 (-2)" in differences
    assert json.loads((folder / "config.json").read_text())["pattern"] == str(PATTERN)
    seconds = json.loads((folder / "timings.json").read_text())
    assert list(seconds) == ["match", "plan", "validate", "rewrite", "debug", "inner compiler"]
    assert all(value >= 0 for value in seconds.values())


def test_the_folder_has_a_guide_to_its_files(tmp_path, capsys):
    run({"debug": tmp_path}, depth=1)
    guide = (tmp_path / "README.md").read_text()
    assert all(f" {name}" in guide for name in FILES)
    (line,) = re.findall("`(import .*)`", guide)
    exec(line, {})
    assert "Tensor query, Tensor key, Tensor value" in capsys.readouterr().out


def test_arguments_of_our_ops_are_named_with_layer_and_origin(tmp_path):
    run({"debug": tmp_path})
    text = (tmp_path / "000" / "rewritten.py").read_text()
    named = [line.strip() for line in text.splitlines() if line.strip().startswith("# sparse_att")]
    assert [line[:60].split(", ")[0] for line in named] == [
        f"# sparse_attention of layer {i} at layers.{i}" for i in range(2)
    ]
    assert all("patterns from options['pattern']: query=" in line for line in named)
    assert all("dense_above=2.0" in line and "layer=" in line for line in named)
    assert "# a_shape: query=" in text and "sink_size=[16" in text


def test_rewritten_nodes_are_shown_with_shapes(tmp_path):
    run({"debug": tmp_path}, dynamic=True)
    text = (tmp_path / "000" / "rewritten.py").read_text()
    lines = [line.strip() for line in text.splitlines() if "sparse_attention.default(" in line]
    assert len(lines) == 2
    assert all(': "f32[1, 4, s' in line for line in lines)
    # What unpacks an index: a count per head, and the columns.
    assert text.count(': "i32[1, 4][4, 1]') == 4


def test_matched_sites_have_proof_formula_and_origin(tmp_path):
    run({"debug": tmp_path})
    (first, second) = json.loads((tmp_path / "000" / "matched.json").read_text())
    assert (first["path"], second["path"]) == ("layers.0", "layers.1")
    assert first["decision"] == "sparse"
    assert first["mask"] == "k <= q"
    assert first["proof"] == ["is_causal=True: k <= q"]
    assert "toys.py" in first["source"]
    assert "pattern" in first["patterns from"]
    text = (tmp_path / "000" / "matched.txt").read_text()
    assert "because is_causal=True: k <= q" in text


def test_dense_sites_are_told_with_their_reason(tmp_path):
    with torch.no_grad():
        compile_toy(Attention(dropout=0.5).train(), {"debug": tmp_path})(torch.randn(1, 300, 32))
    (site,) = json.loads((tmp_path / "000" / "matched.json").read_text())
    assert (site["decision"], "dropout" in site["reason"]) == ("dense", True)


def test_each_graph_gets_the_next_number(tmp_path):
    for depth in (1, 2, 3):
        run({"debug": str(tmp_path)}, depth=depth)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdecimal()) == ["000", "001", "002"]


def test_a_number_that_another_process_took_is_passed_over(tmp_path):
    for name in ("000", "001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").write_text("")
    (tmp_path / "001").rename(tmp_path / "kept")
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "other").write_text("")
    (tmp_path / "kept" / "other").unlink()
    (tmp_path / "kept").rmdir()
    assert debug.write_numbered(tmp_path, {"a": "b"}).name == "002"


@pytest.mark.parametrize("value", ["folder", "1"])
def test_environment_variable_asks_for_a_folder(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPASS_DEBUG", value)
    run()
    folder = tmp_path / ("mpass_debug" if value == "1" else value)
    assert (folder / "000" / "rewritten.py").is_file()
    assert "MPASS_DEBUG" in (folder / "000" / "config.json").read_text()


@pytest.mark.parametrize("value", ["", "0"])
def test_off_by_environment_writes_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPASS_DEBUG", value)
    run()
    assert list(tmp_path.iterdir()) == []


def test_debug_changes_no_bit(tmp_path):
    assert torch.equal(run(), run({"debug": tmp_path}))
    assert torch.equal(run(dynamic=True), run({"debug": tmp_path}, dynamic=True))


def test_printing_changes_no_graph(tmp_path, monkeypatch):
    from mpass.graph import printing as graph_text

    seen = []
    original = graph_text.readable

    def check(gm):
        before = [(node.name, sorted(node.meta)) for node in gm.graph.nodes]
        text = original(gm)
        seen.append(before == [(node.name, sorted(node.meta)) for node in gm.graph.nodes])
        return text

    monkeypatch.setattr(debug, "readable", check)
    run({"debug": tmp_path}, dynamic=True)
    assert len(seen) >= 2
    assert all(seen)


def test_off_prints_no_graph(monkeypatch):
    def refuse(gm):
        raise AssertionError("a graph was printed")

    # TORCH_TRACE of the surrounding run would ask for graphs.
    monkeypatch.setattr(debug, "emit", lambda *arguments: None)
    monkeypatch.setattr(debug, "readable", refuse)
    run()


COST = """
import time, torch
import mpass, mpass.backend
from tests.helpers.toys import Decoder, compile_toy

spent = 0.0

def timed(function):
    def run(*arguments):
        global spent
        start = time.thread_time()
        result = function(*arguments)
        spent += time.thread_time() - start
        return result
    return run

for name in ("open_trace", "close_trace", "finish_trace"):
    setattr(mpass.backend, name, timed(getattr(mpass.backend, name)))
options = {"pattern": mpass.AShape(16, 64), "inner_backend": "inductor"}
start = time.process_time()
with torch.no_grad():
    compile_toy(Decoder(depth=4).eval(), options)(torch.randn(1, 300, 32))
print(spent / (time.process_time() - start))
"""
"""Prints the share of a compile that is spent in the hooks of the debug mode."""


def test_off_costs_less_than_half_a_percent_of_a_compile():
    # In a process of its own: under pytest torch's trace has a listener, so it is not off.
    share = float(run_script(COST).stdout.splitlines()[-1])
    assert share < 0.005


def full_disk(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["mkdir", "write_text"])
def test_full_disk_is_one_warning_and_leaves_nothing(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(Path, failing, full_disk)
    with pytest.warns(debug.DebugFolderWarning, match="No space left") as caught:
        out = run({"debug": tmp_path / "debug"} if failing == "mkdir" else {"debug": tmp_path})
        run({"debug": tmp_path / "debug"} if failing == "mkdir" else {"debug": tmp_path}, depth=1)
    monkeypatch.undo()
    assert len([w for w in caught if w.category is debug.DebugFolderWarning]) == 1
    assert list(tmp_path.rglob("*")) == []
    assert torch.equal(out, run())


def test_disk_that_fills_up_between_files_leaves_no_half_folder(tmp_path, monkeypatch):
    original, written = Path.write_text, []

    def write_text(path, content, **settings):
        written.append(path)
        if len(written) > 3:
            full_disk()
        return original(path, content, **settings)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.warns(debug.DebugFolderWarning):
        run({"debug": tmp_path})
    assert len(written) == 4
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys, warnings
import torch, mpass
from tests.helpers.toys import Decoder, compile_toy

model, x = Decoder(depth=1).eval(), torch.randn(1, 300, 32)
options = {"pattern": mpass.AShape(16, 64), "debug": sys.argv[1]}
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = compile_toy(model, options)(x)
print(len([w for w in caught if w.category is mpass.debug.DebugFolderWarning]), tuple(out.shape))
"""


def test_writes_that_the_system_cuts_off_are_one_warning_and_leave_nothing(tmp_path):
    # No file may grow past 1 KiB: the write itself fails half way, as on a full disk.
    assert run_script(LIMITED, str(tmp_path)).stdout == "1 (1, 300, 32)\n"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mpass import debug

write_text, written = Path.write_text, []

def write(path, *arguments, **settings):
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_text(path, *arguments, **settings)

Path.write_text = write
debug.write_numbered(Path(sys.argv[1]), {"a": "1", "b": "2", "c": "3"})
"""


def test_killed_run_leaves_no_half_folder_and_the_next_run_writes(tmp_path):
    done = run_script(KILLED, str(tmp_path), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.isdecimal()] == []
    run({"debug": tmp_path})
    assert {path.name for path in tmp_path.iterdir()} - {"kernels", "README.md"} == {"000"}


def test_folder_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(debug.DebugFolderWarning, match="cannot be written"):
        run({"debug": tmp_path / "file" / "debug"})


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_one_warning(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(debug.DebugFolderWarning, match="Permission denied"):
        run({"debug": tmp_path / "debug"})


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, content, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        debug.write_numbered(tmp_path, {"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_the_printing_does_not_stop_the_compile(tmp_path, monkeypatch):
    def fault(gm):
        raise RuntimeError("printing failed")

    monkeypatch.setattr(debug, "readable", fault)
    with pytest.warns(debug.DebugFolderWarning, match="printing failed"):
        out = run({"debug": tmp_path})
    monkeypatch.undo()
    assert torch.equal(out, run())


def test_wrong_value_is_refused():
    with pytest.raises(Exception, match="option 'debug' is 3; allowed: True, False or a folder"):
        run({"debug": 3})


def test_log_shows_both_graphs(caplog):
    with caplog.at_level(logging.DEBUG, logger="mpass"):
        run()
    shown = [record.getMessage() for record in caplog.records if record.name == "mpass.debug"]
    assert [text.split("\n")[0] for text in shown] == ["captured graph", "rewritten graph"]
    assert "minference.sparse_attention" in shown[1]


SCRIPT = """
import torch, mpass
from tests.helpers.toys import Decoder, compile_toy
with torch.no_grad():
    compile_toy(Decoder(depth=1).eval(), {"pattern": mpass.AShape(16, 64)})(torch.randn(1, 300, 32))
"""


def run_script(script=SCRIPT, *arguments, check=True, **variables):
    return run_python("-c", script, *arguments, check=check, **variables)


def test_torch_logs_variable_works():
    done = run_script(TORCH_LOGS="+mpass")
    assert "rewritten graph" in done.stderr
    assert "torch.ops.minference.sparse_attention" in done.stderr


BY_LOGGING = """
import logging
logging.basicConfig()
logging.getLogger("mpass").setLevel(logging.INFO)
"""


@pytest.mark.parametrize(
    ("before", "variables"), [("", {"TORCH_LOGS": "mpass"}), (BY_LOGGING, {})], ids=["torch", "own"]
)
def test_a_compile_is_one_line_where_graphs_are_not_asked_for(before, variables):
    said = run_script(before + SCRIPT, **variables).stderr
    told = [line for line in said.splitlines() if "mpass" in line]
    assert len(told) == 1 and "1 of 1 attention layer" in told[0], said
    assert "GraphModule" not in said


def test_structured_trace_holds_the_graphs_and_the_report(tmp_path):
    run_script(TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.glob("*.log")
    text = trace.read_text()
    names = {f"minference_{name}" for name in ("captured_graph", "rewritten_graph", "report")}
    assert all(f'"name": "{name}"' in text for name in names)
    assert "minference.sparse_attention" in text


def test_no_warning_when_all_is_well(tmp_path):
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        run({"debug": tmp_path})
    assert [w for w in caught if w.category is debug.DebugFolderWarning] == []
