"""`mpass serve`: transformers' own OpenAI-compatible server, with long prefills sparse."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import typer

from mpass.cli.prompt import CONFIG, DTYPE, MIN_SEQ_LEN, MODEL, PATTERN, pass_options

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that this command does not know are those of `transformers serve`."""

EXTRA = "pip install 'mpass[serve]'"


def serve(
    context: typer.Context,
    model: MODEL,
    pattern: PATTERN = None,
    config: CONFIG = None,
    min_seq_len: MIN_SEQ_LEN = None,
    dtype: DTYPE = "bf16",
) -> None:
    """Serve a model on CPUs by `transformers serve`, with continuous batching.

    Long prefills are sparse. What is not said here is passed on to `transformers serve`: `--port`,
    `--host`, `--cb-num-blocks`, `--cb-max-batch-tokens` and its other options.
    """
    from mpass.config.model_check import check_model
    from mpass.errors import MissingPackageError
    from mpass.models.load import load_config, model_folder, parse_dtype, require
    from mpass.serving.packed_attention import check_shipped
    from mpass.serving.transformers_attention import register_attention

    options = pass_options(pattern, config, min_seq_len)
    require("transformers")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise MissingPackageError("transformers[serving]", EXTRA)
    torch_dtype = parse_dtype(dtype)
    sizes = load_config(model, dtype=torch_dtype)
    folder = str(model_folder(model, dtype=torch_dtype))
    if "config" in options:
        check_model(options["config"], SimpleNamespace(config=sizes))
    check_shipped(folder, sizes)
    register_attention(paged=True, **options)
    given = ["--continuous-batching", "--attn-implementation", "sdpa", "--device", "cpu"]
    given += ["--dtype", str(torch_dtype).removeprefix("torch.")]
    typer.echo(f"mpass: long prefills are sparse; requests name the model {folder}, or none")
    run_server([folder, *given, *context.args])


def run_server(arguments: list[str]) -> None:
    """Run `transformers serve` until it is stopped, and end the process. Last options win.

    Where the server leaves no thread behind, SystemExit is raised and the caller goes on.
    """
    from transformers.cli.serve import Serve

    server: Any = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    server.command()(Serve)
    before = set(threading.enumerate())
    try:
        server(arguments, prog_name="mpass serve")
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        if any(not thread.daemon for thread in set(threading.enumerate()) - before):
            # The thread that generates is no daemon, and nobody stops it after an interrupt.
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
