"""Which dtypes of query, key, value and output make an attention that kernels compute."""

from __future__ import annotations

import torch

from mpass.graph.nodes import example
from mpass.graph.site import AttentionSite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_reason(site: AttentionSite) -> str:
    """Why no kernel computes what the site computes, by its dtypes; "" if one does."""
    output = example(site.output).dtype
    dtypes = [example(node).dtype for node in (site.query, site.key, site.value)]
    if is_autocast(site):
        return ""
    if dtypes[0] not in DTYPES:
        return f"dtype {dtypes[0]} is not served; allowed: float32, bfloat16, float16"
    if len(set(dtypes)) > 1:
        return "query, key and value differ in dtype: {}, {}, {}".format(*dtypes)
    if output != dtypes[0]:
        return f"the output is of {output}, the query of {dtypes[0]}"
    return ""


def is_autocast(site: AttentionSite) -> bool:
    """Whether autocast narrows query, key and value to the output's dtype before they are used."""
    output = example(site.output).dtype
    dtypes = {example(node).dtype for node in (site.query, site.key, site.value)}
    narrow = output in (torch.bfloat16, torch.float16) and site.compute_dtype == output
    return narrow and dtypes <= {torch.float32, output}
