"""What a call of attention over an index tells the active log, and who watches."""

from __future__ import annotations

import torch

from mpass.lowering.density import density
from mpass.lowering.device import Lowering
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.readback import read_later
from mpass.lowering.recorder import AttentionCall, CallInputs, active_log, tell_watcher


def record_call(
    lowering: Lowering,
    inputs: AttentionInputs,
    index: SparseIndex,
    *,
    layer: int,
    dense_reason: str,
) -> None:
    """Tell the active log, if there is one, what ran.

    dense_reason: of `attend`; what an estimator has noted before is the better reason.
    """
    tell_watcher()
    log = active_log()
    if log is None:
        return
    query, num_keys = inputs.query, inputs.key.shape[2]
    sizes = {"batch": query.shape[0], "num_queries": query.shape[2], "num_keys": num_keys}
    computed = density(index, inputs.mask, **sizes)
    call = AttentionCall(
        layer=layer,
        lowering="dense" if dense_reason else lowering.name,
        computed=read_later(torch.ones_like(computed) if dense_reason else computed),
        num_queries=query.shape[2],
        num_keys=num_keys,
        index_bytes=index.num_bytes(),
        reason=log.dense_reason or dense_reason,
    )
    log.dense_reason = ""
    log.calls.append(call)
    if log.inspect is not None:
        read = (inputs.query, inputs.key, index, inputs.mask, inputs.scale, inputs.softcap)
        log.inspect(call, CallInputs(*read, inputs.sink_logits, inputs.value))
