"""llama.cpp's own server on one file, timed by itself: `python experiments/peers/llamaserver.py MODEL.gguf
--server PATH`. A prompt is run once to warm up, then again without its cache; one JSON object last.

It needs no more than Python, and prints what llamacpp.py does, for machines that have the server alone.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

TEXT = "The quick brown fox jumps over the lazy dog while the sea keeps its own slow time. "
LIMIT_S = 120.0


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    with urllib.request.urlopen(request, timeout=600) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def wait(port: int) -> None:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            ask(port, "/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit(f"llama-server was not ready within {LIMIT_S:g} s")


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--server", required=True)
    p.add_argument("--prompt-tokens", type=int, default=512)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context, threads = str(a.prompt_tokens + a.new_tokens + 8), str(a.threads)
    flags = ["-c", context, "-t", threads, "-tb", threads, "-b", "512", "-ub", "512", "-np", "1"]
    command = [a.server, "-m", a.model, "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(port)
        ids = ask(port, "/tokenize", {"content": TEXT * 200})["tokens"][: a.prompt_tokens]
        body = {"prompt": ids, "n_predict": a.new_tokens, "temperature": 0, "cache_prompt": False,
                "ignore_eos": True}  # fmt: skip
        ask(port, "/completion", body | {"n_predict": 1})
        times = ask(port, "/completion", body)["timings"]
    finally:
        server.kill()
        server.wait()
    print(json.dumps({
        "engine": "llama-server",
        "prefill_tokens_per_s": round(times["prompt_per_second"], 2),
        "decode_tokens_per_s": round(times["predicted_per_second"], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
