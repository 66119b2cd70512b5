"""Attention inside of one op that projects, which stays dense; each op is the line `# here`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

N = 192


def projecting(**settings):
    """A program whose attention is in one op that projects; settings: other arguments of it."""

    def program(q, k, v):
        x = q.transpose(1, 2).flatten(2).transpose(0, 1)
        arguments = PROJECTIONS | settings
        return F.multi_head_attention_forward(x, x, x, **arguments)[0]  # here

    return program


PROJECTIONS: dict[str, Any] = {
    "embed_dim_to_check": 64,
    "num_heads": 4,
    "in_proj_weight": torch.eye(64).repeat(3, 1),
    "in_proj_bias": torch.zeros(192),
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "dropout_p": 0.0,
    "out_proj_weight": torch.eye(64),
    "out_proj_bias": torch.zeros(64),
    "need_weights": False,
}


def projecting_in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        x = q.transpose(1, 2).flatten(2).transpose(0, 1)
        return F.multi_head_attention_forward(x, x, x, **PROJECTIONS)[0]  # here
