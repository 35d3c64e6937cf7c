"""What recovery, pruning, shared keys and alignment are worth: `python -m experiments.quality.recipe ARM...`.

One row an arm, in the order given; qualities do not depend on the machine's load, minutes do.

    bits:B                       a pack of B bits as it is, against what it was made from
    tables:B:STEPS               its tables recovered
    rank:B:R:STEPS[:zero]        factors of rank R (0 steps: closed form alone)
    prune:BY:STEPS:LOSS          to 2/3 of the feed-forwards
    share:N:STEPS                the last N layers share keys and values
    prefill:N                    a prompt's first token and KV bytes, shared over not (no quality)
    align:BASELINE:STEPS:SEED    format prompts of this file, MDLOO
    reject:STEPS:SEED            the same, from a committee's best

MODEL is packed if need be; packs of B bits are made by `outsize pack --bits B --calibrate TEXT`. TEXT is
running text, ANSWERS prompts with answers, of which the first --prompts are used.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import outsize
from experiments.runs import arguments, record
from outsize.adapt.align.mdloo import AlignRecipe
from outsize.adapt.align.run import AlignOptions, align
from outsize.adapt.distill.made import Made
from outsize.adapt.distill.prune import PruneOptions, prune
from outsize.adapt.distill.recover import RecoverOptions, recover
from outsize.adapt.distill.share_kv import ShareOptions, share_kv
from outsize.adapt.distill.task import DistillRecipe
from outsize.adapt.divergence import Divergence
from outsize.adapt.examples import TrainOptions
from outsize.adapt.repack import BitsOptions, bits_of, repack
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.plan.fixed import stored_bytes
from outsize.system.memory import peak

THINGS = (
    "the sea", "a cat", "winter", "bread", "a train", "the moon", "music", "a garden", "rain", "coffee",
    "a library", "the desert", "a bicycle", "honey", "a mountain", "sleep", "a river", "chess", "the wind",
    "a clock", "a bridge", "snow", "a dog", "tea", "the forest", "a lamp", "paper", "a kitchen", "thunder",
    "a boat",
    "the city", "apples", "a horse", "salt", "a window", "stars", "a shoe", "milk", "the beach", "fire",
)  # fmt: skip


def prompts() -> list[dict[str, object]]:
    """Four kinds of format, each of each thing."""
    kinds: list[tuple[str, dict[str, object]]] = [
        ("Describe {} in at most five words.", {"kind": "most_words", "count": 5}),
        ("Write one line about {} in lower case only.", {"kind": "lower"}),
        (
            "Write a sentence about {} that ends with an exclamation mark.",
            {"kind": "ends", "text": "!"},
        ),
        ("Answer about {} in one line only.", {"kind": "lines", "count": 1}),
    ]
    return [
        {"prompt": text.format(thing), "check": check}
        for i, thing in enumerate(THINGS)
        for text, check in kinds[i % 4 :] + kinds[: i % 4]
    ]


class Arms:
    """All arms over one model; what they make is kept in `folder`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.base = fetch.find(args.model) or fetch.pack(args.model, quiet=True)
        self._args, self._text, self._folder = args, args.text, args.folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._asked = self._folder / f"asked-{args.prompts}.jsonl"
        raw = args.answers.read_bytes()
        packed = args.answers.suffix == ".gz"
        lines = (gzip.decompress(raw) if packed else raw).decode().splitlines()
        made = self._asked.with_suffix(f".{os.getpid()}")  # others may read it now
        made.write_text("\n".join(lines[: args.prompts]))
        made.replace(self._asked)

    def few(self, bits: str) -> Pack:
        options = BitsOptions(float(bits), calibrate=self._text, force=True, quiet=True)
        return repack(self.base, options).pack

    def where(self, pack: Pack, name: str) -> TrainOptions:
        about = self._args
        out = self._folder / f"{name.replace(':', '-')}-{about.batch}-{about.seed}.safetensors"
        data, every = (self._text, self._asked), about.every
        return TrainOptions(str(pack.path), data, out, own_answers=False, every=every, quiet=True)

    def recipe(self, steps: str, rate: float, loss: str = "kl") -> DistillRecipe:
        given = self._args
        return DistillRecipe(
            steps=int(steps),
            batch=given.batch,
            rate=rate,
            length=given.length,
            seed=given.seed,
            loss=loss,
        )

    def run(self, arm: str) -> dict[str, Any]:
        kind, *told = arm.split(":")
        found: dict[str, Any] = getattr(self, kind)(arm, *told)
        return found

    def bits(self, arm: str, bits: str) -> dict[str, Any]:
        pack = self.few(bits)
        made = recover(RecoverOptions(self.where(pack, arm), self.recipe("0", 1e-3), None))
        return {"bits": bits_of(pack), "bytes": pack.size} | figures(made.before)

    def tables(self, arm: str, bits: str, steps: str) -> dict[str, Any]:
        pack = self.few(bits)
        made = recover(RecoverOptions(self.where(pack, arm), self.recipe(steps, 1e-3), None))
        told = {"bits": bits_of(made.pack), "bytes": made.pack.size, "before": figures(made.before)}
        return told | figures(made.after)

    def rank(
        self, arm: str, bits: str, rank: str, steps: str, begin: str = "closed"
    ) -> dict[str, Any]:
        pack = self.few(bits)
        options = RecoverOptions(self.where(pack, arm), self.recipe(steps, 5e-4), int(rank), begin)
        made = recover(options)
        assert made.adapter is not None
        size = made.adapter.stat().st_size
        weights = 8 * sum(
            len(t.keys) * m.size
            for t in pack.tables if t.kind == "layers"
            for ms in t.tensors.values() for m in ms if m.num_rows > 1
        ) / bits_of(pack)  # fmt: skip
        told = {"bits": bits_of(pack) + 8 * size / weights, "bytes": pack.size + size}
        begun = {"before": figures(made.before), "begun": figures(made.begun)}
        return told | begun | figures(made.after)

    def prune(self, arm: str, by: str, steps: str, loss: str) -> dict[str, Any]:
        recipe = self.recipe(steps, 3e-4, loss)
        return of_pack_made(prune(PruneOptions(self.where(self.base, arm), recipe, "2/3", by, 60)))

    def share(self, arm: str, layers: str, steps: str) -> dict[str, Any]:
        recipe = self.recipe(steps, 3e-4)
        made = share_kv(ShareOptions(self.where(self.base, arm), recipe, int(layers)))
        kv = [stored_bytes(of_pack(p)) for p in (made.base, made.pack)]
        return of_pack_made(made) | {"kv_bytes": kv, "path": made.pack.path.name}

    def prefill(self, arm: str, layers: str, tokens: int = 512, times: int = 7) -> dict[str, Any]:
        """In turn; the medians."""
        recipe = self.recipe("0", 3e-4)
        made = share_kv(ShareOptions(self.where(self.base, arm), recipe, int(layers)))
        took: list[list[float]] = [[], []]
        words = self._text.read_text()[: 12 * tokens]
        models = [
            outsize.load(str(p.path), quiet=True, context=2048, prefix_cache="off")
            for p in (made.base, made.pack)
        ]
        for _ in range(times):
            for model, each in zip(models, took, strict=True):
                text = model.tokens.decode(model.tokens.encode(words)[:tokens])
                each.append(model.generate(text, raw=True, max_tokens=1)[0].first_token_s)
        for model in models:
            model.close()
        kv = [stored_bytes(of_pack(p)) for p in (made.base, made.pack)]
        medians = [statistics.median(each) for each in took]
        return {"tokens": tokens, "first_token_s": took, "medians": medians, "kv_bytes": kv}

    def align(self, arm: str, baseline: str, steps: str, seed: str) -> dict[str, Any]:
        return self._aligned(arm, "mdloo", steps, seed, baseline)

    def reject(self, arm: str, steps: str, seed: str) -> dict[str, Any]:
        return self._aligned(arm, "reject", steps, seed, "loo")

    def _aligned(
        self, arm: str, method: str, steps: str, seed: str, baseline: str
    ) -> dict[str, Any]:
        file = self._folder / f"formats-{arm.replace(':', '-')}.json"
        file.write_text(json.dumps({"name": "formats", "prompts": prompts()}))
        recipe = AlignRecipe(
            steps=int(steps), batch=8, rate=1e-3, seed=int(seed), samples=4, max_tokens=24, baseline=baseline,
        )  # fmt: skip
        where = self.where(self.base, arm)
        made = align(AlignOptions(where, recipe, file, method))
        return {"pass_before": made.before, "pass_after": made.after, "steps": made.steps}


def figures(found: Mapping[str, Divergence]) -> dict[str, Any]:
    """By kind of text."""
    return {
        kind: {
            "kl": d.kl, "top1": d.top1, "perplexity": d.perplexity, "source_perplexity": d.former_perplexity,
        }
        for kind, d in found.items()
    }  # fmt: skip


def of_pack_made(made: Made) -> dict[str, Any]:
    told = {"base_bytes": made.base.size, "bytes": made.pack.size, "begun": figures(made.begun)}
    return told | figures(made.after)


def main() -> None:
    args = arguments(
        __doc__, "arms+", model=str, text=Path, answers=Path, folder=Path, batch=4, length=256, seed=0,
        prompts=160, every=25,
    )  # fmt: skip
    arms = Arms(args)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for arm in args.arms:
        started, used = time.monotonic(), time.process_time()
        row = arms.run(arm)
        minutes = {
            "minutes": round((time.monotonic() - started) / 60, 2),
            "processor_minutes": round((time.process_time() - used) / 60, 2),
            "peak_mb": round(peak() / 1e6),
        }
        told = {key: getattr(args, key) for key in ("batch", "length", "seed", "prompts")}
        about = {"arm": arm, "model": Path(args.model).name, "device": name, **told}
        record(about | row | minutes, args.output)


if __name__ == "__main__":
    main()
