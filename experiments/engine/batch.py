"""Eight prompts of different lengths, together and one after another:
`python -m experiments.engine.batch [MODEL]`.

Asserts that the texts are the same; the ratio is of total tokens/s. One JSON object last.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import outsize
from outsize.options import DEFAULT_MODEL

BASE = "The history of the sea is long and full of people who left home to find new land. "
REPEATS, NEW_TOKENS = 5, 96


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL
    with outsize.load(name, quiet=True) as model:
        prompts = [(BASE * 9)[: 60 + 70 * i] + str(i) for i in range(8)]
        model.generate(prompts, raw=True, max_tokens=8)
        ratios, together_s, apart_s, tokens = [], [], [], 0
        for _ in range(REPEATS):
            started = time.perf_counter()
            together = model.generate(prompts, raw=True, max_tokens=NEW_TOKENS)
            middle = time.perf_counter()
            apart = [model.generate(p, raw=True, max_tokens=NEW_TOKENS)[0] for p in prompts]
            ended = time.perf_counter()
            assert [r.text for r in together] == [r.text for r in apart], "void: texts differ"
            tokens = sum(r.new_tokens for r in together)
            together_s.append(middle - started)
            apart_s.append(ended - middle)
            ratios.append((ended - middle) / (middle - started))
    print(
        json.dumps({
            "command": "python -m experiments.engine.batch",
            "prompt_tokens": [r.prompt_tokens for r in together],
            "new_tokens": tokens,
            "together_tokens_per_s": round(tokens / statistics.median(together_s), 1),
            "apart_tokens_per_s": round(tokens / statistics.median(apart_s), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
            "same_texts": True,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
