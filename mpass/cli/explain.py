"""`mpass explain`: which attentions of a model become sparse, which do not, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, OUTPUT, check_output, deliver
from mpass.errors import DeviceError, OptionValueError

CHIP_NAMES = ("a100", "h100", "h200", "b200", "l40s", "mi300x", "rtx4090")

LENGTH = Annotated[
    str | None,
    typer.Option(
        "--length",
        "--lengths",
        help="Tokens of the prompt, 2048 if not given; for a chip several: 8192,131072.",
        show_default=False,
    ),
]
DEVICE = Annotated[
    str,
    typer.Option(
        help="cpu or cuda; or a chip to predict times for, which need not be here: a100, h100, "
        "h200, b200, l40s, mi300x, rtx4090.",
        autocompletion=prompt.starting(("cpu", "cuda", *CHIP_NAMES)),
    ),
]

DEFAULT_LENGTH = 2048


def explain(
    model: prompt.MODEL,
    text: prompt.TEXT = "code",
    length: LENGTH = None,
    pattern: prompt.PATTERN = None,
    config: prompt.CONFIG = None,
    dtype: prompt.DTYPE = "bf16",
    device: DEVICE = "cpu",
    min_seq_len: prompt.MIN_SEQ_LEN = None,
    as_json: AS_JSON = False,
    output: OUTPUT = None,
) -> None:
    """Tell which attentions of a model become sparse on a prompt, and why the rest does not.

    The model runs once without Inductor; densities are those of this prompt. For a chip nothing
    runs: times per layer are predicted, sparse and dense, for prompts of the usual density.
    """
    check_output(output)
    from mpass.lowering.triton.chips import CHIPS

    lengths = parse_lengths(length)
    if device.lower() in CHIPS:
        given = (pattern, config, min_seq_len)
        predict(model, device.lower(), lengths, given, dtype, as_json, output)
        return
    if len(lengths) > 1:
        raise OptionValueError("length", length, "one number of tokens where the model runs")
    tokens = lengths[0] if lengths else DEFAULT_LENGTH
    try:
        prompt.check_prompt(text, tokens, dtype, device)
    except DeviceError as error:
        known = f"{error.allowed}; to predict times: {', '.join(CHIPS)}"
        raise DeviceError(device, known) from None
    parsed = prompt.pass_options(pattern, config, min_seq_len)
    import torch

    from mpass.inspection.explanation import explain as explain_model

    body, inputs = prompt.load_prompt(model, text, tokens, dtype, device)
    with torch.inference_mode():
        explanation = explain_model(body, options=parsed, **inputs)
    deliver(
        explanation.as_dict,
        lambda: str(explanation),
        output=output,
        as_json=as_json,
        save=explanation.save,
    )


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """Numbers of tokens separated by commas, none for None; raises OptionValueError."""
    if text is None:
        return ()
    allowed = "an int >= 1, or several separated by commas"
    try:
        lengths = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise OptionValueError("length", text, allowed) from None
    if min(lengths) < 1:
        raise OptionValueError("length", text, allowed)
    return lengths


def predict(
    model: str,
    chip: str,
    lengths: tuple[int, ...],
    given: tuple[str | None, Path | None, int | None],
    dtype: prompt.Dtype,
    as_json: bool,
    output: Path | None,
) -> None:
    """Print what the attention of a model is predicted to cost on a chip.

    given: pattern, config and min_seq_len, as `prompt.pass_options` takes them.
    """
    if output is not None and output.suffix == ".html":
        raise OptionValueError("output", str(output), "a file for JSON: a prediction has no page")
    from mpass.inspection.prediction import LENGTHS, predict_model
    from mpass.lowering.triton.chips import CHIPS
    from mpass.models.load import parse_dtype
    from mpass.options import parse_options

    kind = parse_dtype(dtype)
    if dtype == "fp32":
        raise OptionValueError("dtype", dtype, "bf16 or fp16: GPUs serve no others")
    options = parse_options(None, prompt.pass_options(*given))
    found = predict_model(model, CHIPS[chip], options, lengths=lengths or LENGTHS, dtype=kind)
    deliver(found.as_dict, lambda: str(found), output=output, as_json=as_json, save=found.save)
