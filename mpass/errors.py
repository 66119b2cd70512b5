"""Every error that a user of mpass can cause, one class each.

The message names what is at fault (key, value, layer, head, shape) and what to do about it.
All of them derive from `MpassError`, so that one `except` clause catches what mpass refuses.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class MpassError(Exception):
    """Base class of everything that mpass refuses."""


class UnknownOptionError(MpassError):
    """A key of torch.compile's `options=` that is neither ours nor Inductor's."""

    def __init__(self, key: str, known: Iterable[str]) -> None:
        super().__init__(
            f"unknown option {key!r} for backend 'minference'{nearest(key, known)}; "
            f"options are those of mpass.options.Options and of torch._inductor.config"
        )


class EngineSettingError(UnknownOptionError):
    """A key that is none of the plugin's settings in the configuration of an engine."""

    def __init__(self, key: str, place: str, known: Iterable[str]) -> None:
        names = list(known)
        MpassError.__init__(
            self,
            f"unknown key {key!r} in {place}{nearest(key, names)}; keys are {', '.join(names)}",
        )


class OptionValueError(MpassError):
    """A known option with a value that it cannot take."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"option {key!r} is {value!r}; allowed: {allowed}")


class GridError(MpassError):
    """A grid that the tokens of an attention do not fill, or that causal attention was given."""


class KVCacheError(MpassError):
    """A cache that cannot be cut to what was selected, or not be shortened after that."""

    def __init__(self, layer: int, problem: str) -> None:
        where = f"layer {layer} of the cache" if layer >= 0 else "the cache"
        super().__init__(f"{where} cannot be cut: {problem}")


class DenoisingMemoryError(MpassError):
    """A denoising run that would keep more than it may."""

    def __init__(self, needed: int, allowed: int, sites: int) -> None:
        attentions = f"{sites} attention{'s' if sites > 1 else ''}"
        super().__init__(
            f"mpass.denoising would keep {needed:,} bytes for the {attentions} seen so far, and "
            f"memory is {allowed:,}; give memory={needed} or more, make fewer layers sparse, or "
            f"run in a narrower dtype"
        )


class ArgumentError(MpassError):
    """A number that a function of ours cannot take."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        told = f"a {type(value).__qualname__}" if hasattr(value, "shape") else repr(value)
        super().__init__(f"{name} is {told}; allowed: {allowed}")


class UnknownPatternError(MpassError):
    """A pattern name that no registered pattern has."""

    def __init__(self, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"unknown pattern {name!r}{nearest(str(name), names)}; registered: {', '.join(names)}"
        )


class PatternValueError(MpassError):
    """A pattern's parameter outside of its range."""

    def __init__(self, pattern: str, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{pattern}: {field} is {value!r}; allowed: {allowed}")


class PatternClassError(MpassError):
    """A class that cannot be registered as a pattern: something is missing or of a wrong type."""

    def __init__(self, cls: type, fault: str, remedy: str) -> None:
        super().__init__(f"pattern class {cls.__module__}.{cls.__qualname__}: {fault}; {remedy}")


class PatternFileError(MpassError):
    """A file that was to bring a pattern and does not."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"{place}: {fault}; give FILE.py:Class, the class of a pattern")


class PatternNameTakenError(MpassError):
    """Two pattern classes of one name, or a pattern named as one of mpass's own ops."""

    def __init__(self, name: str, newcomer: str, owner: str) -> None:
        super().__init__(
            f"pattern name {name!r} of {newcomer} is taken by {owner}; give the class another name"
        )


class PatternLoadError(MpassError):
    """An installed package whose entry point for patterns cannot be loaded."""

    def __init__(self, name: str, module: str, package: str, error: BaseException) -> None:
        super().__init__(
            f"patterns of entry point {name!r} ({module}) of package {package} are not available: "
            f"{in_one_line(error)}; repair, update or uninstall that package"
        )


class ConfigMismatchError(MpassError):
    """A SparseConfig that does not fit the model: other layers or heads than the model has."""


class UnknownLayerError(ConfigMismatchError):
    """Patterns were given per layer, and the number of an attention's layer cannot be found out."""

    def __init__(self, path: str, given_by: str) -> None:
        super().__init__(
            f"{given_by} gives layers their own patterns, and the layer of the attention at "
            f"{path or 'the compiled function'} is unknown. Compile the whole model; or give the "
            f"attention's module its number as `layer_idx`; or name patterns for all layers alike."
        )


class ConfigFileError(MpassError):
    """A config file that cannot be read or written. `errors`: every (JSON path, what is wrong)."""

    SHOWN = 20

    def __init__(self, source: object, errors: Iterable[tuple[str, str]]) -> None:
        self.errors = list(errors)
        lines = [f"  {path}: {message}" for path, message in self.errors[: self.SHOWN]]
        if len(self.errors) > self.SHOWN:
            lines.append(f"  ... and {len(self.errors) - self.SHOWN} more")
        noun = "fault" if len(self.errors) == 1 else "faults"
        super().__init__("\n".join([f"config {source}: {len(self.errors)} {noun}", *lines]))

    @property
    def faults(self) -> list[tuple[str, str]]:
        """The same, by its earlier name."""
        return self.errors


class BudgetError(MpassError):
    """A calibration budget that no choice of patterns meets."""

    def __init__(
        self, budget: float, least: float, what: str = "time", dense: float | None = None
    ) -> None:
        """budget, least: what was allowed and what is needed, in seconds where `what` is "time".

        dense: the seconds of dense attention, where they are known: then both are told as shares of
        it, as the user gave the budget.
        """
        if dense is None:
            super().__init__(
                f"no choice of patterns meets a {what} of {budget:.4g}, the least is {least:.4g}; "
                f"allow more, or offer other candidates"
            )
            return
        share = math.ceil(100 * least / dense) / 100
        super().__init__(
            f"no choice of patterns keeps attention within {budget / dense:.1%} of the time of "
            f"dense attention ({budget:.3g} of {dense:.3g} s a prompt): the cheapest takes "
            f"{least / dense:.1%} or more ({least:.3g} s). Give --budget {share:.2f} or more "
            f"(`budget` of Settings), or offer cheaper patterns by --pattern; what was measured is "
            f"kept in the state file, if there is one, and is not measured again"
        )


class CalibrationError(MpassError):
    """A model or inputs that a calibration can do nothing with."""


class ShapeError(MpassError):
    """Tensors whose shapes do not make an attention."""


class MaskShapeError(ShapeError):
    """A mask in words (mpass.serving.transformers_attention) about another number of keys."""

    def __init__(self, layer: int, shape: tuple[int, ...], num_keys: int) -> None:
        super().__init__(
            f"layer {layer}: the mask of shape {list(shape)} does not describe {num_keys} keys. "
            "Give the model an attention mask that is as long as cache and prompt together, or "
            'load it with attn_implementation="sdpa".'
        )


class TensorTypeError(MpassError):
    """An argument that must be a tensor and is something else."""

    def __init__(self, name: str, value: object) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        super().__init__(f"{name} is a {kind}; expected a torch.Tensor (torch.as_tensor makes one)")


class ModuleTypeError(MpassError):
    """Something that is given to be compiled and is no module."""

    def __init__(self, model: object) -> None:
        super().__init__(
            f"a {type(model).__qualname__} is no torch.nn.Module; functions are compiled by "
            'torch.compile(function, backend="minference")'
        )


class GradientError(MpassError):
    """Inputs that need a gradient, which sparse attention does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} needs a gradient, and sparse attention has none: call it under "
            "torch.no_grad() or torch.inference_mode(), or detach its inputs"
        )


class TooLargeError(MpassError):
    """A result that would not fit into memory."""

    def __init__(self, what: str, size: int, limit: int, remedy: str) -> None:
        super().__init__(
            f"{what} would take {size / 2**30:.1f} GiB, more than {limit / 2**30:.0f}; {remedy}"
        )


class DtypeError(MpassError):
    """A dtype that no lowering serves."""

    def __init__(self, dtype: object, allowed: str) -> None:
        super().__init__(f"dtype {dtype} is not served; allowed: {allowed}")


class DeviceError(MpassError):
    """A device that no lowering serves."""

    def __init__(self, device: object, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(f"device {str(device)!r} is not served; allowed: {allowed}")


class ModelNotFoundError(MpassError):
    """A model that is neither a short name nor a folder or GGUF file that can be loaded."""

    def __init__(self, model: object, short_names: Iterable[str], fault: str = "") -> None:
        names = sorted(short_names)
        super().__init__(
            f"model {str(model)!r}: {fault or 'no such folder or file'}"
            f"{nearest(str(model), names)}; give one of {', '.join(names)}, a folder in the "
            f"transformers format, or a GGUF file"
        )


class MissingPackageError(MpassError):
    """A package that this command needs is not installed, or its files are damaged."""

    def __init__(self, package: str, command: str, fault: str = "not installed") -> None:
        super().__init__(f"package {package} is {fault}; run: {command}")


class UnknownTextError(MpassError):
    """A text name that is not one of ours, or a file that cannot be read."""

    def __init__(self, name: object, known: Iterable[str], fault: str = "no such text") -> None:
        names = sorted(known)
        super().__init__(
            f"text {str(name)!r}: {fault}{nearest(str(name), names)}; "
            f"give one of {', '.join(names)}, or a UTF-8 file"
        )


class TextTooShortError(MpassError):
    """A text with fewer tokens than the length asked."""

    def __init__(self, tokens: int, length: int) -> None:
        super().__init__(
            f"the text has {tokens} tokens, fewer than the length {length}; "
            f"give a longer text or a length of at most {tokens}"
        )


def in_one_line(error: BaseException) -> str:
    """`TypeError: what it says first`."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
