"""The package as a whole: who may import whom, what a wheel holds, what an import costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import networkx as nx
import pytest

import mpass
from mpass.patterns.base import registered_patterns
from tests.helpers.paths import ROOT

FOLDERS = {"mpass": "mpass", "mpass.lowering": "lowering", "mpass.patterns": "patterns"}

LAYERS = [
    "errors",
    "failures",
    "files",
    "lowering",
    "patterns",
    "config",
    "options",
    "graph",
    "masks",
    "match",
    "resolve",
    "plan",
    "validation",
    "rewrite",
    "warm_up",
    "inspection.text_table",
    "story.remedies",
    "report",
    "story",
    "inspection.decisions",
    "debug",
    "inspection.kernels",
    "backend",
    "exported",
    "functional",
    "serving",
    "models",
    "inspection",
    "calibration",
    "evaluate",
    "cli",
    "__main__",
]
"""Every module and package, lowest first: each may import what stands before it, and itself.

`inspection.kernels` asks the compilers about kernels and knows nothing else of its package, and
`story.remedies` is a table of texts.
"""

MOST_LINES = 400

LARGEST_WHEEL = 1e6
"""Bytes of a wheel."""

MOST_ENTRIES = 30
"""Files and folders directly in mpass/ stay below this: more do not read as a pipeline."""


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All parts of a module but `main` and what calls it where the module is run as a program."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "__main__" in ast.dump(child.test):
            continue
        if isinstance(child, ast.FunctionDef) and child.name == "main":
            continue
        yield child
        yield from statements(child)


def imports(path: Path, known: Collection[str]) -> set[str]:
    """What a module imports: at once, inside of functions, and for its annotations only."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module in known or not module.startswith("mpass")}


def import_graph() -> nx.DiGraph:
    known = modules()
    graph = nx.DiGraph()
    for name, path in known.items():
        for target in imports(path, known):
            if target != name and not name.startswith(target + "."):
                graph.add_edge(name, target)
    return graph


def test_imports_have_no_circles():
    graph = import_graph().subgraph(modules())
    assert [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1] == []


def layer_of(module: str) -> int | None:
    """The place of a module, or of the innermost of its packages that has one."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((LAYERS.index(name) for name in names if name in LAYERS), None)


def test_every_module_has_a_layer():
    known = modules()
    assert [module for module in known if module != "mpass" and layer_of(module) is None] == []
    stale = [layer for layer in LAYERS if f"mpass.{layer}" not in known]
    assert stale == [], "layers without a module"


def test_imports_go_down_the_layers():
    graph = import_graph().subgraph(modules())
    layers = {module: layer_of(module) for module in graph}
    assert "mpass" not in graph or not list(graph.successors("mpass"))
    wrong = [
        f"{source} imports {target}"
        for source, target in graph.edges
        if "mpass" not in (source, target) and layers[target] > layers[source]
    ]
    assert wrong == []


def test_modules_import_what_defines_the_ops_that_they_call():
    """An op is there once its module was imported; in a bare process nobody else has done that."""
    texts = {name: path.read_text() for name, path in modules().items()}
    defining = {
        op: name
        for name, text in texts.items()
        for op in re.findall(r'(?:define_op\(\s*"|f"\{NAMESPACE\}::)(\w+)",', text)
    }
    assert len(defining) > 10
    graph = import_graph()
    missing = []
    for name, text in texts.items():
        for op in re.findall(r"torch\.ops\.minference\.(\w+)", text):
            if defining[op] != name and not nx.has_path(graph, name, defining[op]):
                missing.append(f"{name} calls {op} and imports no {defining[op]}")
    assert missing == []


def test_the_packages_folder_reads_as_a_pipeline():
    entries = {path.name for path in (ROOT / "mpass").iterdir()} - {"__pycache__"}
    assert len(entries - {"lowering", "patterns"}) < MOST_ENTRIES


@pytest.mark.parametrize("folder", ["mpass", "lowering", "patterns", "benchmarks", "tests"])
def test_files_are_short(folder):
    kinds = ("*.py", "*.h", "*.jinja", "*.js")
    files = [path for kind in kinds for path in (ROOT / folder).rglob(kind)]
    files = [path for path in files if "vendor" not in path.parts and "build" not in path.parts]
    lengths = {str(path): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("package", ["mpass.lowering", "mpass.patterns"])
def test_lowering_and_patterns_do_not_know_graphs_or_models(package):
    for source, target in import_graph().edges:
        if source.startswith(package):
            assert not target.startswith(("torch.fx", "transformers")), f"{source}: {target}"
        if source.startswith("mpass.lowering"):
            assert not target.startswith("mpass.patterns"), f"{source}: {target}"


def test_the_pass_does_not_import_transformers():
    passes = nx.descendants(import_graph(), "mpass.backend") | {"mpass.backend"}
    assert "transformers" not in {module.split(".")[0] for module in passes}


def test_vllm_is_imported_by_those_parts_of_its_plugin_that_it_loads():
    importers = {source for source, target in import_graph().edges if target.startswith("vllm")}
    parts = ("registration", "engine", "cpu", "cuda")
    assert importers == {f"mpass.serving.vllm.{part}" for part in parts}


def test_no_module_is_imported_by_a_bare_name():
    for source, target in import_graph().edges:
        assert target.split(".")[0] not in ("lowering", "patterns"), source


def run(code: str, **env: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mpass_is_light():
    out = run(
        "import sys, mpass; print([m for m in ('torch', 'triton', 'sympy', 'transformers', "
        "'rich', 'typer') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_every_name_of_mpass_is_there():
    for name in mpass.__all__:
        assert getattr(mpass, name) is not None, name


def test_the_stub_has_every_exported_name_and_no_other():
    stub = ast.parse((ROOT / "mpass" / "__init__.pyi").read_text())
    named = {
        alias.asname: f"{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(named) - {"errors", "patterns"} == set(mpass.__all__) - {"__version__"}
    for name in set(mpass.__all__) - {"__version__"}:
        assert getattr(importlib.import_module(named[name]), name) is getattr(mpass, name), name


def test_the_file_that_types_are_checked_with_uses_every_name():
    text = (ROOT / "tests" / "typing" / "public_names.py").read_text()
    unused = [name for name in mpass.__all__ if not re.search(rf"\bmpass\.{name}\b", text)]
    assert unused == []
    assert text.count("type: ignore[") == 2, "the two mistakes that a checker has to find"


def test_submodules_are_there_after_a_bare_import():
    code = "import mpass; print(mpass.errors.MpassError.__name__, mpass.patterns.__name__)"
    assert run(code).split() == ["MpassError", "mpass.patterns"]


def test_a_name_that_mpass_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        mpass.no_such_thing  # noqa: B018


def test_every_pattern_of_ours_is_a_name_of_mpass():
    own = {
        cls
        for cls in registered_patterns().values()
        if cls.__module__.startswith("mpass.patterns.")
    }
    assert {getattr(mpass, cls.__name__) for cls in own} == own


def test_importing_torch_does_not_import_mpass():
    assert run("import sys, torch; print('mpass' in sys.modules)").strip() == "False"


def test_importing_the_backend_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import mpass.backend, mpass.functional, mpass.patterns.base as base; "
        "print(len(base.registered_patterns()) >= 4)"
    )
    assert run(code).strip() == "True"


def test_backend_is_found_by_name_without_importing_mpass():
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
assert "mpass" not in sys.modules
assert "minference" in torch._dynamo.list_backends()
config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=99,
                     num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(0, 99, (1, 200))
options = {"min_seq_len": 128, "inner_backend": "aot_eager", "pattern": "a_shape"}
with torch.no_grad():
    compiled = torch.compile(model, backend="minference", fullgraph=True, options=options)
    out = compiled(ids, use_cache=True).logits
    print((out - model(ids).logits).abs().max().item() < 1e-4)
import mpass
print(len(mpass.last_report().sparse_sites))
"""
    assert run(code).split() == ["True", "2"]


@pytest.mark.xdist_group("wheel")  # builds in one folder
def test_wheel_holds_one_top_level_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), "."],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mpass"}
    sources = {name for name in names if name.endswith(".py")}
    for folder, package in (("mpass", "mpass"), ("lowering", "mpass/lowering")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in sources, path
    for path in [*(ROOT / "lowering").rglob("*.jinja"), *(ROOT / "lowering").rglob("*.h")]:
        assert f"mpass/lowering/{path.relative_to(ROOT / 'lowering')}" in names, path
    assert "mpass/py.typed" in names
    assert wheel.stat().st_size < LARGEST_WHEEL
    assert wheel.name.startswith(f"mpass-{mpass.__version__}-")
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "[torch_dynamo_backends]\nminference = mpass.backend:minference" in text
    metadata = next(name for name in names if name.endswith("METADATA"))
    shown = zipfile.ZipFile(wheel).read(metadata).decode().partition("\n\n")[2]
    assert "# mpass" in shown and "https://arxiv.org" in shown
    inside = re.findall(r"\]\((?!https?:)[^)]*\)", shown)
    assert inside == [], "links that lead nowhere on a package index"
