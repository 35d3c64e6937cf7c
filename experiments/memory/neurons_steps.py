"""What a cache of neurons reads on text, step by step as in LLM in a flash (arXiv 2312.11514): every weight,
half of them held, with a predictor, with a window (and other policies), and in drafted steps. Bytes only:
which bundles the model's predictor chose for each token of a text is recorded once, with the engine, and
replayed through the engine's policies.

    python -m experiments.memory.neurons_steps MODEL FILE TEXT NAME --tokens 400 -o
    experiments/results/epyc-2core/neurons-steps.jsonl

FILE: of `outsize adapt sparsity`. Rows: `union` of the last k tokens' bundles, and what how often each fires
gives for it; `budget`, what a token reads under a policy in such a share of the model's bytes, warmed up;
`drafted`, steps of five rows of which three are accepted (the others are of elsewhere in the text), where the
window counts a step's first rows or all; `run`, quarters of the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import Row, arguments, record
from outsize.caching.eviction import window
from outsize.caching.policy import Hints, Policy, make
from outsize.engine import load as loading
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from outsize.pack import fetch, neuron_file
from outsize.pack.format import Pack
from outsize.pack.neuron_file import NeuronFile
from outsize.weights.bundles import Bundles, find

PROMPT, WARM = 32, 64  # tokens before those that are recorded; and of those, that are not counted
KS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32
SHARES = 0.35, 0.5, 0.65, 0.8
POLICIES = "window", "lru", "lfu", "belady"
ROWS, ACCEPTED = 5, 3  # of a drafted step
Token = list[list[int]]  # ids of bundles, by layer


def recorded(model: str, neurons: str, text: str, count: int) -> list[Token]:
    """What was chosen for each of a text's tokens, run one by one."""
    layers: list[list[int]] = []

    def hear(layer: int, rows: Sequence[Sequence[int]], weights: object, ahead: object) -> None:
        layers.append(list(rows[0]))

    options = LoadOptions(neurons=neurons, draft="none", prefix_cache="off", quiet=True)
    out: list[Token] = []
    with loading.open_model(model, options, hear) as opened:
        t, ids = opened.transformer, opened.tokens.encode(text)[: PROMPT + count]
        kv = t.new_kv(len(ids))
        full(t, [Span(0, ids[:PROMPT])], [kv])
        for at in range(PROMPT, len(ids)):
            layers.clear()
            full(t, [Span(at, [ids[at]])], [kv])
            out.append(list(layers))
    return out


def replayed(policy: Policy, steps: Sequence[Sequence[Token]], each: int) -> list[int]:
    """Bundles that are read at each step; a step is the tokens of its rows."""
    reads = []
    for tokens in steps:
        policy.begin_pass()
        reads.append(0)
        for layer in range(len(tokens[0])):
            rows = [[layer * each + i for i in token[layer]] for token in tokens]
            policy.observe(layer, rows)
            ids = sorted({i for row in rows for i in row})
            for at in range(0, len(ids), policy.room):
                reads[-1] += len(policy.place(ids[at : at + policy.room]).loads)
            policy.finish_ranking()
    return reads


def drafted_steps(trace: list[Token]) -> list[list[Token]]:
    """Rows of each step: tokens of the text, and what was drafted in vain, for which tokens from half a text
    away stand: what comes next would be asked for again at once."""
    steps, away = [], len(trace) // 2
    for at in range(0, len(trace) - ROWS, ACCEPTED):
        wrong = [trace[(at + i + away) % len(trace)] for i in range(ACCEPTED, ROWS)]
        steps.append(trace[at : at + ACCEPTED] + wrong)
    return steps


class Replays:
    """A trace, and what its bundles weigh."""

    def __init__(self, pack: Pack, bundles: Bundles, file: NeuronFile, trace: list[Token]) -> None:
        self.trace, self._pack, self._predictor = trace, pack, file.size
        self._firing = file.numbers(neuron_file.FIRING)
        self.count, self._layers = bundles.count, pack.description.num_layers
        self.stride = max(t.form.stride for t in bundles.tables)
        self.dense = sum(t.dense.size for t in bundles.tables)

    def policy(self, name: str, slots: int) -> Policy:
        future = []
        if name == "belady":
            for token in self.trace:
                future += [[i * self.count + b for b in ids] for i, ids in enumerate(token)]
        return make(name, slots, Hints(future=future, per_layer=self.count, layers=self._layers))

    def slots(self, share: float) -> int:
        """Bundles that fit into such a share of the model's bytes, beside all else and the predictor."""
        room = share * self._pack.size - (self._pack.size - self.dense) - self._predictor
        return int(min(room // self.stride, self.count * self._layers))

    def unions(self) -> Iterator[Row]:
        for k in KS:
            found = [
                len(set().union(*(token[layer] for token in self.trace[at - k : at])))
                for at in range(WARM, len(self.trace))
                for layer in range(self._layers)
            ]
            expected = float((1 - (1 - self._firing) ** k).mean())  # were tokens not alike
            share = sum(found) / len(found) / self.count
            yield {"kind": "union", "k": k, "share": share, "expected": expected}

    def budgets(self) -> Iterator[Row]:
        asked = sum(len(ids) for token in self.trace[WARM:] for ids in token)
        tokens, whole = len(self.trace) - WARM, self._pack.size
        for share in SHARES:
            slots = self.slots(share)
            row: Row = {
                "kind": "budget", "share": share, "slots": slots,
                "held_share": slots / self.count / self._layers,
                "naive_mb": whole / 1e6, "half_mb": (1 - share) * whole / 1e6,
                "predictor_mb": asked * self.stride / tokens / 1e6,
            }  # fmt: skip
            for name in POLICIES if slots >= self.count else ():  # a layer's fit at once
                reads = replayed(self.policy(name, slots), [[t] for t in self.trace], self.count)
                row[f"{name}_mb"] = sum(reads[WARM:]) * self.stride / tokens / 1e6
            yield row

    def drafted(self) -> Iterator[Row]:
        slots = max(16, self.slots(0.5))
        steps = drafted_steps(self.trace)
        row: Row = {"kind": "drafted", "rows": ROWS, "accepted": ACCEPTED, "slots": slots}
        for name, alpha in (("kept_share_mb", window.ALPHA), ("kept_all_mb", 1.0)):
            before, window.ALPHA = window.ALPHA, alpha
            try:
                reads = replayed(self.policy("window", slots), steps, self.count)
            finally:
                window.ALPHA = before
            first = WARM // ACCEPTED
            row[name] = sum(reads[first:]) * self.stride / ACCEPTED / len(reads[first:]) / 1e6
        yield row

    def quarters(self) -> Iterator[Row]:
        slots = max(16, self.slots(0.5))
        reads = replayed(self.policy("window", slots), [[t] for t in self.trace], self.count)
        size = len(reads) // 4
        parts = [sum(reads[i * size : (i + 1) * size]) * self.stride / size / 1e6 for i in range(4)]
        yield {"kind": "run", "tokens": len(reads), "slots": slots, "quarters_mb": parts}


def main() -> None:
    a: Any = arguments(__doc__, "model", "file", "text", "name", tokens=400, skip=0)
    pack = fetch.pack(a.model, quiet=True)
    file = neuron_file.read(Path(a.file), pack.description.num_layers)
    bundles = find(pack, file.about.bundle, file.about.order)
    text = Path(a.text).read_text(encoding="utf-8")[a.skip :]
    trace = recorded(a.model, a.file, text[: 12 * (a.tokens + PROMPT)], a.tokens)
    replays = Replays(pack, bundles, file, trace)
    fires = sum(len(ids) for token in trace for ids in token) / len(trace)
    said = {
        "model": a.name, "predictor": file.about.predictor, "bundle": bundles.bundle,
        "text": Path(a.text).name,
        "tokens": len(trace), "fires": fires / bundles.count / pack.description.num_layers,
    }  # fmt: skip
    for part in (replays.unions, replays.budgets, replays.drafted, replays.quarters):
        for row in part():
            told = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
            record(said | told, a.output)


if __name__ == "__main__":
    main()
