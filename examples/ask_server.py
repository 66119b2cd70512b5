"""Ask an OpenAI-compatible server about several files at once.

    mpass serve smollm2 --port 8000 --cb-num-blocks 64 --cb-max-batch-tokens 8192
    python examples/ask_server.py http://127.0.0.1:8000 "What is this about?" FILE...

Any client of the OpenAI API does; this one needs nothing but Python. The server batches requests by
itself: short ones are answered while a long prompt is read in. A server of one model needs no name
of it.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen


def ask(server: str, prompt: str, max_tokens: int = 64) -> str:
    """The answer to one prompt."""
    messages = [{"role": "user", "content": prompt}]
    settings = {"max_tokens": max_tokens, "temperature": 0, "stream": False}
    body = json.dumps({"messages": messages, **settings})
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server}/v1/chat/completions", body.encode(), headers)
    with urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main(server: str, question: str, *files: str) -> None:
    """Print each answer, and how long it took."""

    def timed(file: str) -> str:
        start = time.perf_counter()
        answer = ask(server, f"{Path(file).read_text(encoding='utf-8')}\n\n{question}")
        return f"{file} ({time.perf_counter() - start:.1f} s): {answer}"

    with ThreadPoolExecutor(max(1, len(files))) as pool:
        for line in pool.map(timed, files):
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
