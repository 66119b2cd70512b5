"""`mpass doctor`: what to change so that a model's attention becomes sparse, or faster."""

from __future__ import annotations

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, JSON_OUTPUT, check_output, deliver


def doctor(
    model: prompt.MODEL,
    text: prompt.TEXT = "code",
    length: prompt.LENGTH = 4096,
    pattern: prompt.PATTERN = None,
    config: prompt.CONFIG = None,
    dtype: prompt.DTYPE = "bf16",
    device: prompt.DEVICE = "cpu",
    min_seq_len: prompt.MIN_SEQ_LEN = None,
    as_json: AS_JSON = False,
    output: JSON_OUTPUT = None,
) -> None:
    """Tell what to change in a model, its options or this machine, the largest cause first.

    The same run as of `mpass explain`, its attentions grouped by cause.
    """
    check_output(output)
    prompt.check_prompt(text, length, dtype, device)
    options = prompt.pass_options(pattern, config, min_seq_len)
    import torch

    from mpass.inspection.doctor import diagnose
    from mpass.inspection.explanation import explain

    body, inputs = prompt.load_prompt(model, text, length, dtype, device)
    with torch.inference_mode():
        found = diagnose(explain(body, options=options, **inputs))
    deliver(found.as_dict, lambda: str(found), output=output, as_json=as_json)
