"""A plugin for vLLM: long prefills are sparse, everything else is vLLM's own attention.

vLLM finds it by the entry point `vllm.general_plugins`, so that `pip install 'mpass[vllm]'` is all
there is to do. docs/serving.md says how it is used; in this folder

- `settings.py` reads `additional_config={"minference": {...}}` and plans each layer,
- `batch.py` picks the long prefills out of a batch,
- `pages.py` gathers keys and values out of vLLM's pages,
- `layer.py` and `builder.py` are what a backend of vLLM gets mixed in, and know no vLLM,
- `counters.py` counts what was sparse,
- `warm.py` builds the kernels of a layer before the first request,
- `registration.py`, `engine.py`, `cpu.py` and `cuda.py` import vLLM; nothing else does.
"""

from __future__ import annotations

from mpass.serving.vllm.counters import Counters, process_counters

__all__ = ["Counters", "process_counters", "register"]


def register() -> None:
    """Register the backends with vLLM, in each of its processes; vLLM calls it.

    MPASS_VLLM=0 in the environment leaves vLLM alone. So does whatever goes wrong here, with a
    warning: another version of vLLM, or a damaged installation, keeps its own attention.
    """
    import os

    if os.environ.get("MPASS_VLLM", "1") == "0":
        return
    try:
        from mpass.serving.vllm.registration import register_backends

        register_backends()
    except Exception as error:
        import logging

        from mpass.errors import in_one_line

        logging.getLogger("vllm.mpass").warning(
            "mpass does not work with this vLLM, which keeps its own attention: %s",
            in_one_line(error),
        )
