"""The family that one set of routers gives: for thresholds from the narrowest width to nearly all, what is
executed and what it costs, measured on a held-out text by the engine that will run it.

Shapes: K predictions, V vocabulary, L layers, N pieces of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.adapt.nested.aims import threshold_at
from outsize.adapt.nested.task import NestedTask
from outsize.adapt.sparsity.words import spread
from outsize.engine.model import Model
from outsize.forward.full import full, hidden
from outsize.forward.span import Span
from outsize.model.width import Width
from outsize.pack.nested_file import Member
from outsize.progress import Progress

SHARES = (0.35, 0.45, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)  # of the feed-forwards, that thresholds aim at
MOST = 4  # sequences
TOKENS = 16  # that speed is measured on


@dataclass(frozen=True, slots=True)
class Measured:
    """One member of the family. `use_LN`: how often a token uses each piece."""

    member: Member
    use_LN: Tensor
    tokens_per_s: float


def thresholds(task: NestedTask) -> list[float]:
    """That aim at `SHARES`, by the routers on the training text."""
    seen = task.run(spread(task.ids_BT, MOST), task.routed)
    logits = torch.stack(
        [task.logits(i, x).detach().flatten(0, 1) for i, x in enumerate(seen.inputs)]
    )
    shares = task.widths.shares
    aims = (share for share in SHARES if share > float(shares[0]))
    found = {0.0, *(round(threshold_at(logits, share, shares), 6) for share in aims)}
    return sorted(found)


class _Sums:
    """What one member costs, so far. `threshold` None: the whole model."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.width = None if threshold is None else Width(0.0, threshold, tally={})
        self.nll = self.kl = self.agrees = 0.0

    def add(self, model: Model, ids: Sequence[int], former: Tensor) -> None:
        """A sequence, whose log-probabilities the whole model has given."""
        now = former if self.width is None else _logits(model, ids, self.width)
        following = torch.tensor(ids[1:], dtype=torch.int64, device="cpu")
        self.nll += float(cross_entropy(now, following, reduction="sum"))
        self.kl += float((former.exp() * (former - now)).sum())
        self.agrees += float((now.argmax(1) == former.argmax(1)).sum())

    def member(self, count: int) -> Member:
        share = 1.0 if self.width is None else self.width.executed
        threshold = 1.0 if self.threshold is None else self.threshold
        perplexity = math.exp(self.nll / count)
        return Member(threshold, share, perplexity, max(0.0, self.kl / count), self.agrees / count)


@torch.inference_mode()
def measure(
    model: Model, ids_BT: Tensor, wanted: Sequence[float], progress: Progress
) -> list[Measured]:
    """Of a model whose routers are in place: a member for each threshold, then the whole model."""
    sequences = [ids.tolist() for ids in spread(ids_BT, MOST)]
    sums = [_Sums(threshold) for threshold in (*wanted, None)]
    for number, ids in enumerate(sequences):
        former = _logits(model, ids, None)
        for at, one in enumerate(sums):
            progress("measuring widths", number * len(sums) + at, len(sequences) * len(sums))
            one.add(model, ids, former)
    count = sum(len(ids) - 1 for ids in sequences)
    return [
        Measured(
            one.member(count), use_of(model, one.width), _speed(model, sequences[0], one.threshold)
        )
        for one in sums
    ]


def _logits(model: Model, ids: Sequence[int], width: Width | None) -> Tensor:
    """(K, V) log-probabilities after each token but the last."""
    transformer = model.transformer
    span = Span(0, ids[:-1], width=width)
    (h_TD,) = hidden(transformer, [(span, transformer.new_kv(len(ids)))])
    return torch.cat([transformer.logits(some).log_softmax(1) for some in h_TD.split(64)])


def use_of(model: Model, width: Width | None) -> Tensor:
    """(L, N) how often a token used each piece; of the whole model always."""
    count, layers = model.transformer.nested.count, model.pack.description.num_layers
    out = torch.zeros(layers, count, dtype=torch.float32, device="cpu")
    if width is None:
        return out + 1
    for (layer, pieces), times in (width.tally or {}).items():
        out[layer, :pieces] += times
    return out / out[:, :1].clamp_min(1)


def _speed(model: Model, ids: Sequence[int], threshold: float | None) -> float:
    """Tokens a second, of single steps; the median."""
    transformer, took = model.transformer, list[float]()
    kv = transformer.new_kv(len(ids))
    for at in range(min(TOKENS, len(ids))):
        width = None if threshold is None else Width(0.0, threshold)
        begun = time.perf_counter()
        full(transformer, [Span(at, [ids[at]], width=width)], [kv])
        took.append(time.perf_counter() - begun)
    return 1 / sorted(took)[len(took) // 2]


def rising(found: Sequence[Measured]) -> list[Measured]:
    """Those whose shares rise with their thresholds: upper layers see other streams at another width."""
    out: list[Measured] = []
    for one in found:
        if not out or one.member.share > out[-1].member.share:
            out.append(one)
    return out


def table(found: Sequence[Measured], sizes: tuple[int, int]) -> Iterator[str]:
    """The family, by lines. `sizes`: bytes of all pieces, and of what every token reads beside them."""
    yield (
        f"{'--width':>8}{'of ffn':>8}{'active':>9}{'MB a token':>12}{'perplexity':>12}{'KL':>8}"
        f"{'top-1':>8}{'tokens/s':>10}"
    )
    for one in found:
        m, size = one.member, sizes[1] + one.member.share * sizes[0]
        active = size / sum(sizes)
        name = "full" if m.share == 1 else f"{m.share:.2f}"
        yield (
            f"{name:>8}{m.share:>8.1%}{active:>9.1%}{size / 1e6:>12,.1f}{m.perplexity:>12,.2f}{m.kl:>8.3f}"
            f"{m.agrees:>8.1%}{one.tokens_per_s:>10.1f}"
        )
