"""How right is a mask drafter, and does it know?
`python -m experiments.drafting.mtp_sure MODEL --draft mtp:FILE --prompts FILE.jsonl [--per-category 3]`.

Greedy answers are walked over once more with masks after every token, whatever a step would have used. One
JSON object: tokens a step if a step began everywhere, and for each of a block's guesses, those before it
being right, how many are right by how likely they were held to be.
"""

from __future__ import annotations

from pathlib import Path

import outsize
from experiments.drafting.lossless import answers
from experiments.runs import arguments, record
from outsize.bench.speculate import read
from outsize.draft.drafter import Draft
from outsize.draft.mtp import block_of
from outsize.draft.stats import kind_of
from outsize.forward.full import full
from outsize.forward.span import Span

BINS = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
AT_ONCE = 5  # tokens, with masks after each of them


def guesses(model, prompt: list[int], answer: list[int]):  # type: ignore[no-untyped-def]
    """(number of the answer's token after the anchor, what the block there guesses) for each token."""
    t, masks, known = model.transformer, model.drafting.mtp, prompt + answer
    kv, first = model.new_kv(len(known) + AT_ONCE * masks.k), len(prompt) - 1
    full(t, [Span(0, known[:first], 1)], [kv])
    for start in range(0, len(answer), AT_ONCE):
        fed = known[first + start : first + min(start + AT_ONCE, len(answer))]
        blocks = masks.masks(tuple(range(len(fed))), masks.k)
        (out,) = full(t, [Span(first + start, fed, len(fed), blocks)], [kv])
        for place in range(len(fed)):
            states = block_of(Draft(masks=blocks), place, out)
            yield start + place, masks.predict(states, answer[start + place])


def main() -> None:
    a = arguments(
        __doc__, "model", draft=("auto", "mtp:FILE, or auto for the one that ships"), prompts=Path,
        per_category=3, longest=(900, "tokens of a prompt"), new=128,
    )  # fmt: skip
    with outsize.load(a.model, draft=a.draft, context=a.longest + a.new + 64, quiet=True) as model:
        texts = [text for _, text in read(a.prompts, a.per_category)]
        prompts = [x for x in model.encode(texts, outsize.Options()) if len(x) <= a.longest]
        counts = [[[0, 0] for _ in BINS] for _ in range(model.drafting.mtp.k)]
        steps = tokens = 0
        for prompt, (answer, _) in zip(prompts, answers(model, prompts, a.new)[0], strict=True):
            for number, block in guesses(model, prompt, answer):
                steps, tokens = steps + 1, tokens + 1
                for place, guess in enumerate(block[: len(answer) - number - 1]):
                    good = guess.token == answer[number + 1 + place]
                    found = counts[place][kind_of(guess.prob, BINS)]
                    found[0], found[1], tokens = found[0] + 1, found[1] + good, tokens + good
                    if not good:
                        break
    right = [[(n, round(good / max(1, n), 3)) for n, good in row] for row in counts]
    record({
        "draft": Path(a.draft).name, "answers": len(prompts), "steps": steps,
        "tokens_per_step": round(tokens / max(1, steps), 4), "from": BINS, "right": right,
    }, a.output)  # fmt: skip


if __name__ == "__main__":
    main()
