"""What a user can do about each reason to stay dense, as docs/reasons.md says it at length."""

from __future__ import annotations

import re

NOTHING = "nothing needs to be done"

REMEDIES: tuple[tuple[str, str], ...] = (
    (r"^one query", NOTHING),
    (
        r"^\S+( \(\d+ now\))? (keys|queries), sparse from",
        "lower min_seq_len if it pays on your machine",
    ),
    (r"^the config keeps every head", "change the config if this is not wanted"),
    (
        r"^not causal: dense by default",
        "name a pattern that serves it if what it loses may be lost, best with "
        'options={"summaries": 16}',
    ),
    (r"^not causal: ", "choose one of the patterns that serve attention to later keys"),
    (
        r"causal, and ",
        "nothing, if this is an encoder beside the model that the config is for",
    ),
    (
        r"^gradients are recorded",
        "run under torch.no_grad() or torch.inference_mode(), or train sparse, with "
        'options={"training": "sparse"}',
    ),
    (r"^no backward kernels|^no gradient of a bias", "train on a CPU"),
    (
        r"^a bias by distance is not seen by",
        "choose union, vertical_slash, sample_attention or a pattern that is not estimated",
    ),
    (
        r"^trained under a mask",
        "load the model with attn_implementation='sdpa' and give it a padding mask [B, N] or none",
    ),
    (r"^trained (under lists|where rows)", "nothing: it is trained dense"),
    (r"^a checkpoint with a context_fn", "checkpoint without context_fn"),
    (
        r"^the best keys are chosen by numbers of few digits",
        "compute in float32, or under autocast with the bias in float32",
    ),
    (r"^the best keys of each query are found", "run on a CPU"),
    (r"dropout p=", "call model.eval()"),
    (r"^dtype ", "cast the model to a dtype that is served"),
    (r"Triton kernels take bfloat16", "cast the model, or use torch.autocast"),
    (
        r"triton is not installed|Triton kernels need",
        "pip install 'mpass[gpu]' brings Triton; or use a newer GPU",
    ),
    (r"^no kernels are generated for device", "run on a CPU or a CUDA GPU"),
    (r"dynamic$|must be known when compiling", "do not mark heads or head_dim as dynamic"),
    (
        r"made of too many parts|takes more than \d+ steps",
        "make the mask by comparing positions (torch.arange) instead of row by row",
    ),
    (
        r"known to be a mask: .* is an input",
        "if it hides keys, build it inside the compiled model from a padding mask [B, N]; if it is "
        "a bias by distance, make it of the positions' difference inside the compiled model",
    ),
    (
        r"is an input whose values are unknown|position of the first query",
        "build the mask inside the compiled model from a padding mask [B, N], or with transformers "
        'load the model with attn_implementation="minference" after mpass.register_attention()',
    ),
    (
        r"known to be a mask: .*(scatter|topk)",
        "keep keys by topk, scatter and masked_fill after causality, as transformers' Doge does",
    ),
    (
        r"a learned bias|known to be a mask: .*(embedding|gather)",
        "make it of the difference of positions, k - q, as T5 and ALiBi do, or add a number per "
        "key: other biases run dense",
    ),
    (
        r"this op is not understood|too many parts",
        "write the mask with comparisons of positions, or add a mask rule",
    ),
    (r"result goes back into them", "nothing: scores that are changed by scores are not served"),
    (r"scores are also read|read more than once", "do not ask for the attention weights"),
    (r"without enable_gqa", "pass enable_gqa=True"),
    (r"^attention without a softmax|^the softmax is over", "nothing: such attention is not served"),
    (
        r"^softmax attention that is not read|^scores have|broadcast or reshaped",
        "write it with scores [B, H, Nq, Nk]; heads that are mixed are not served",
    ),
    (r"joined with others by cat", "join the keys and the values instead of the scores"),
    (r"may differ per head", "pass a mask that heads share as [B, 1, Nq, Nk]"),
    (
        r"^scores are scaled by what is not a constant",
        "make the factor a Python number; hide keys by masked_fill or an added mask, not by a "
        "product",
    ),
    (r"is not a constant", "make it a Python number"),
    (r"sub-graph", "disable checkpointing for inference"),
    (r"log-sum-exp", "do not ask for it"),
    (
        r"BlockMask",
        "make the BlockMask by create_block_mask from the same mask_mod, for these lengths",
    ),
    (r"computes its weights: pass", "pass need_weights=False, or do not ask for the weights"),
    (r"makes rows NaN", "set torch.backends.mha.set_fastpath_enabled(False)"),
    (r"queries do not see their own position|hides every key", "check the mask"),
    (r"mean of values", "hide keys by minus infinity"),
    (
        r"may stand after the last key|no sum of products|known at run time",
        "tie the lengths together",
    ),
    (
        r"^never compiled",
        "raise torch._dynamo.config.recompile_limit (and accumulated_recompile_limit) above the "
        "number of layers before the first call",
    ),
    (r"^mpass failed", "report it; the results are right"),
    (r"mask is not proven", "build the mask from positions in int64"),
    (r"two biases", "add the biases to each other first"),
    (
        r"bias|what differs",
        "add one number per key, as [.., 1, Nk], or a bias made of k - q: others are not served",
    ),
)
"""Regular expressions of reasons, the first that is found decides, and what to do."""


def remedy_of(reason: str) -> str:
    """What to do about a reason to stay dense, as a phrase."""
    found = (remedy for pattern, remedy in REMEDIES if re.search(pattern, reason))
    return next(found, "nothing: such attention is not served; docs/reasons.md has more")
