"""Eight prompts of different lengths, together and one after another: `python -m experiments.engine.batch`.

Asserts that the texts are the same; the ratio is of total tokens/s. One JSON object last.
"""

from __future__ import annotations

import time

import outsize
from experiments.runs import arguments, compared, told_all
from outsize.options import DEFAULT_MODEL

BASE = "The history of the sea is long and full of people who left home to find new land. "
REPEATS, NEW_TOKENS = 5, 96


def main() -> None:
    a = arguments(__doc__, "model?")
    with outsize.load(a.model or DEFAULT_MODEL, quiet=True) as model:
        prompts = [(BASE * 9)[: 60 + 70 * i] + str(i) for i in range(8)]
        model.generate(prompts, raw=True, max_tokens=8)
        together_s, apart_s = [], []
        for _ in range(REPEATS):
            started = time.perf_counter()
            together = model.generate(prompts, raw=True, max_tokens=NEW_TOKENS)
            middle = time.perf_counter()
            apart = [model.generate(p, raw=True, max_tokens=NEW_TOKENS)[0] for p in prompts]
            together_s.append(middle - started)
            apart_s.append(time.perf_counter() - middle)
            assert [r.text for r in together] == [r.text for r in apart], "void: texts differ"
    tokens = sum(r.new_tokens for r in together)
    result = {
        "command": "python -m experiments.engine.batch", "same_texts": True, "new_tokens": tokens,
        "prompt_tokens": [r.prompt_tokens for r in together],
    }  # fmt: skip
    speeds = [[tokens / s for s in seconds] for seconds in (together_s, apart_s)]
    told_all(result | compared(*speeds), a.output)


if __name__ == "__main__":
    main()
