"""What is installed beside torch: not much, and without Triton everything on a CPU works."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib

from packaging.markers import default_environment
from packaging.requirements import Requirement

from tests.helpers.paths import ROOT

LARGEST = 60e6
"""Bytes that mpass and what it needs may add to an environment with a CPU build of torch."""

WITHOUT_TRITON = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())

import torch
import mpass
import mpass.inspection.prediction
from mpass.cli.app import app
from torch import nn
from typer.testing import CliRunner

class Layer(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

model = mpass.compile(Layer(), pattern="a_shape(64, 128)", min_seq_len=64, dense_above=2.0)
x = torch.randn(1, 2, 256, 16)
with torch.no_grad(), mpass.record() as log:
    found = model(x)
cells = mpass.computed_mask(x, x, pattern="a_shape(64, 128)")
exact = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=cells)
assert (found - exact).abs().max() < 1e-5
assert [call.lowering for call in log.calls] == ["cpu"], log.calls
assert CliRunner().invoke(app, ["env"]).exit_code == 0
assert "triton" not in sys.modules
print("right without triton")
"""


def requirements(name: str, extras: tuple[str, ...] = ()) -> set[str]:
    """Names of all packages that a package needs here, itself included."""
    environment = {key: str(value) for key, value in default_environment().items()}
    found: set[str] = set()
    waiting = [(name, extras)]
    while waiting:
        package, wanted = waiting.pop()
        if package in found:
            continue
        found.add(package)
        for line in importlib.metadata.distribution(package).requires or ():
            need = Requirement(line)
            names = [environment | {"extra": extra} for extra in ("", *wanted)]
            if need.marker is None or any(need.marker.evaluate(known) for known in names):
                waiting.append((need.name.lower(), tuple(need.extras)))
    return found


def size_of(package: str) -> int:
    """Bytes of a package's files."""
    files = importlib.metadata.distribution(package).files or ()
    places = (file.locate() for file in files)
    return sum(place.stat().st_size for place in places if place.is_file())


def own_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def test_beside_a_cpu_torch_little_is_installed():
    torch = requirements("torch") | {"triton"}  # this environment's torch may be one for CUDA
    added = set().union(*(requirements(need.name) for need in own_requirements())) - torch
    assert "triton" not in added and "transformers" not in added
    folders = [ROOT / "mpass", ROOT / "lowering", ROOT / "patterns"]
    sources = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    own = sum(path.stat().st_size for path in sources if "__pycache__" not in path.parts)
    assert own + sum(map(size_of, added)) < LARGEST


def test_triton_comes_with_an_extra_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(need.name != "triton" for need in own_requirements())
    assert any(line.startswith("triton") for line in project["optional-dependencies"]["gpu"])


def test_everything_on_a_cpu_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300
    )
    assert "right without triton" in done.stdout, done.stderr
