"""Do drafts change anything?
`python -m experiments.drafting.lossless MODEL --prompts FILE.jsonl [--count 200] [--drafts SPEC...]`.

Greedy answers to many prompts, without drafts and with each drafter: tokens must be the same, and the
checksum of every kept token's logits, which holds to the bit in int4 and int8 packs. One JSON object a
drafter.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import outsize
from experiments.runs import arguments, record
from outsize.bench.speculate import read
from outsize.draft.verify import verify
from outsize.engine import decode as flow
from outsize.engine.drive import drive
from outsize.options import Options
from outsize.sampling.sample import Sampler, greedy

DRAFTS = ["auto", "ngram:k=4", "ngram:k=15"]


def answers(model: outsize.Model, prompts: list[list[int]], new: int) -> tuple[list, float]:
    """(tokens, checksums of their logits) of each answer; tokens a step."""
    out, steps, made = [], 0, 0
    for ids in prompts:
        sums: list[int] = []

        def pick(logits_V, tokens, sums=sums):  # type: ignore[no-untyped-def]
            sums.append(zlib.crc32(logits_V.numpy().tobytes()))
            return greedy(logits_V, tokens)

        seq = flow.Sequence(list(ids), len(ids), len(ids) + new, frozenset(model.pack.eos))
        account, kv = flow.DraftCounts(), model.new_kv(len(ids) + new)
        drafter, _ = model.drafting.new(Sampler(Options(), 0))
        life = flow.decode(seq, (drafter, verify), pick, account)
        for _ in drive(model.transformer, [life], [kv], model.drafting.step_times):
            pass
        out.append((seq.new_tokens, sums[: len(seq.new_tokens)]))  # a draft may go on after the end
        steps, made = steps + account.steps, made + len(seq.new_tokens) - 1
    return out, made / max(1, steps)


def main() -> None:
    a = arguments(
        __doc__, "model", prompts=Path, count=200, new=48, drafts=DRAFTS,
        longest=(400, "tokens of a prompt, at the most"),
    )  # fmt: skip
    want: list = []
    for draft in ["none", *a.drafts]:
        with outsize.load(a.model, draft=draft, context=a.longest + a.new, quiet=True) as model:
            texts = [text for _, text in read(a.prompts, 0)]
            encoded = model.encode(texts, outsize.Options())
            prompts = [ids for ids in encoded if len(ids) <= a.longest][: a.count]
            found, rate = answers(model, prompts, a.new)
        want = want or found
        pairs = list(zip(found, want, strict=True))
        record({
            "model": Path(a.model).name, "draft": draft, "prompts": len(pairs), "new_tokens": a.new,
            "same_tokens": sum(ours[0] == theirs[0] for ours, theirs in pairs),
            "same_logits": sum(ours[1] == theirs[1] for ours, theirs in pairs),
            "tokens_per_step": round(rate, 3),
        }, a.output)  # fmt: skip


if __name__ == "__main__":
    main()
