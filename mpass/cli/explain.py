"""`mpass explain`: which attentions of a model become sparse, which do not, and why."""

from __future__ import annotations

import typer

from mpass.cli import prompt


def explain(
    model: prompt.MODEL,
    text: prompt.TEXT = "code",
    length: prompt.LENGTH = 2048,
    pattern: prompt.PATTERN = None,
    config: prompt.CONFIG = None,
    dtype: prompt.DTYPE = "bf16",
    device: prompt.DEVICE = "cpu",
    min_seq_len: prompt.MIN_SEQ_LEN = None,
    output: prompt.OUTPUT = None,
) -> None:
    """Tell which attentions of a model become sparse on a prompt, and why the rest does not.

    The model runs once without Inductor; densities are those of this prompt.
    """
    prompt.check_output(output)
    prompt.check_prompt(text, length, dtype, device)
    options = prompt.pass_options(pattern, config, min_seq_len)
    import torch

    from mpass.inspection.explanation import explain as explain_model

    body, inputs = prompt.load_prompt(model, text, length, dtype, device)
    with torch.inference_mode():
        explanation = explain_model(body, options=options, **inputs)
    typer.echo(str(explanation))
    if output is not None:
        explanation.save(output)
        typer.echo(f"Saved to {output}")
