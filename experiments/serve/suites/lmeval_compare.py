"""Compares lm-eval's log-likelihoods over HTTP with the model's own of the same tokens. Run by lmeval.sh."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import outsize
from outsize.engine.model import Model

LIMIT = 1e-4


def own(model: Model, context: str, text: str) -> float:
    """The log-likelihood of a text after a context, with lm-eval's cut: both are encoded together."""
    if not context:  # lm-eval begins with the token that begins a text, or ends one
        first = model.pack.eos[0] if model.pack.bos is None else model.pack.bos
        tokens = [first, *model.tokens.encode(text, start=False)]
        return sum(model.score_tokens(tokens)[0])
    trimmed = context.rstrip()
    text = context[len(trimmed) :] + text
    tokens = model.tokens.encode(trimmed + text, start=False)
    start = len(model.tokens.encode(trimmed, start=False))
    return sum(model.score_tokens(tokens)[0][start - 1 :])


def main(source: str, files: list[str]) -> int:
    worst, compared = 0.0, 0
    with outsize.load(*[source] * bool(source), quiet=True) as model:
        for file in files:
            for line in Path(file).read_text().splitlines():
                sample = json.loads(line)
                for arguments, response in zip(
                    sample["arguments"].values(), sample["resps"], strict=True
                ):
                    context = arguments.get("arg_0", "") if "arg_1" in arguments else ""
                    text = arguments.get("arg_1", arguments.get("arg_0"))
                    (over_http,) = response
                    over_http = over_http[0] if isinstance(over_http, list) else over_http
                    worst = max(worst, abs(float(over_http) - own(model, context, text)))
                    compared += 1
    print(f"{compared} log-likelihoods compared, largest difference {worst:.2g}")
    return int(worst > LIMIT or not compared)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
