"""Alignment by rewards that a program checks: MDLOO (arXiv 2407.21075). A whole answer is one action, there
is no critic, and a KL trust region takes the place of clipping.

    R(x, y) = reward - beta * log(pi(y|x) / pi_ref(y|x))
    A_i     = R_i - mean of the others' R           (leave-one-out over the K samples of a prompt)
    maximise  E[ratio * A] - (1 / eta) * KL(pi || pi_k),   ratio = pi / pi_k

pi_k is the policy that sampled: for some steps in a row the same samples are learned from.

Shapes: P prompts, K samples of each, M = P * K answers, S tokens, N predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.adapt.align.task_file import Prompt
from outsize.adapt.answers import answer
from outsize.adapt.change import AS_IS, Change
from outsize.adapt.distill.data import Batch, collate
from outsize.adapt.distill.factors import LoraStudent
from outsize.adapt.distill.task import states
from outsize.adapt.examples import Example
from outsize.adapt.loop import Recipe
from outsize.adapt.processes import average, processes
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import real, whole
from outsize.errors import OptionError

BASELINES = ("loo", "mean", "none")
STEEP = 20.0  # of a log ratio, at most: beyond, its exponential is no use
MEASURED = 4  # answers to each held-out prompt


@dataclass(frozen=True, slots=True)
class AlignRecipe(Recipe):
    """How to align. `batch`: prompts a step; `samples`: answers to each; `inner`: steps on the same samples.
    `baseline`: "loo" (the mean of the others), "mean" (of all samples of a step) or "none"."""

    samples: int = 4
    inner: int = 2
    beta: float = 0.02
    eta: float = 1.0
    max_tokens: int = 32
    rank: int = 8
    baseline: str = "loo"

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name, least, most in (
            ("samples", 2, 256), ("inner", 1, 1024), ("max_tokens", 1, 1 << 16), ("rank", 1, 1 << 14),
        ):  # fmt: skip
            whole(name, getattr(self, name), least, most)
        real("beta", self.beta, 0.0, 1e3)
        real("eta", self.eta, 1e-6, 1e6)
        if self.baseline not in BASELINES:
            raise OptionError(f"baseline is {self.baseline!r}; known are {', '.join(BASELINES)}")


class Asked(NamedTuple):
    """A prompt as tokens, its number, and what its answers are checked for."""

    tokens: list[int]
    number: int
    prompt: Prompt


class Sampled(NamedTuple):
    """Answers of the policy that sampled: with their prompts, advantages, and log-probabilities then; `R` of
    each, where it was just sampled."""

    examples: list[Example]
    advantage_M: Tensor
    before_M: Tensor
    total_PK: Tensor | None = None


Decode = Callable[[Sequence[int]], str]


class AlignTask:
    """A `Task` of the training loop."""

    use = "--adapter NAME="

    def __init__(
        self,
        recipe: AlignRecipe,
        student: LoraStudent,
        asked: tuple[Sequence[Asked], Sequence[Asked]],
        decode: Decode,
        ends: frozenset[int],
    ) -> None:
        """`asked`: prompts to train on, and those held out; `decode`: an answer's tokens as text."""
        self.recipe, self.parameters = recipe, student.parameters
        self.student, self._model = student, student.model
        self.asked, self._held_out = asked
        self._decode, self._ends = decode, ends
        self._sampled: Sampled | None = None

    def loss(self, step: int, part: slice) -> Tensor:
        """Of a step's prompts, as many for each process; sampled anew every `inner` steps."""
        r, change = self.recipe, self.student.change(step)
        if self._sampled is None or step % r.inner == 0:
            self._sampled = self.sample(step - step % r.inner, part, change)
        found = self._sampled
        now_M = log_probs(self._model, found.examples, change)
        log_ratio_M = (now_M - found.before_M).clamp(-STEEP, STEEP)
        ratio_M = log_ratio_M.exp()
        kl = (ratio_M * log_ratio_M - (ratio_M - 1)).mean()
        return kl / r.eta - (ratio_M * found.advantage_M).mean()

    def sample(self, step: int, part: slice, change: Change) -> Sampled:
        """K answers to each of this process's prompts of a step."""
        r = self.recipe
        generator = torch.Generator().manual_seed(r.seed * 1_000_003 + step)
        rows = torch.randint(len(self.asked), (r.batch,), generator=generator).tolist()
        chosen = [self.asked[i] for i in rows][part]
        with torch.no_grad():
            made = self.draw(chosen, r.samples, r.seed + 7919 * (step + 1), change)
            examples = [
                Example(a.tokens + tokens, len(a.tokens))
                for a, answers in zip(chosen, made, strict=True)
                for tokens in answers
            ]
            before = log_probs(self._model, examples, change)
            former = log_probs(self._model, examples, AS_IS) if r.beta else before
        rewards = [self.passes(a, answers) for a, answers in zip(chosen, made, strict=True)]
        total_PK = torch.tensor(rewards, dtype=before.dtype, device=before.device)
        total_PK = total_PK - r.beta * (before - former).view(len(chosen), -1)
        mean = total_PK.mean()
        if processes()[1] > 1:
            average([mean])
        advantage = advantages(total_PK, r.baseline, mean)
        return Sampled(examples, advantage.flatten(), before, total_PK)

    def passes(self, a: Asked, answers: Sequence[list[int]]) -> list[float]:
        """1 for each answer that does, 0 for others."""
        texts = (self._decode([t for t in tokens if t not in self._ends]) for tokens in answers)
        return [float(a.prompt.check.passes(text)) for text in texts]

    def draw(
        self, chosen: Sequence[Asked], count: int, seed: int, change: Change
    ) -> list[list[list[int]]]:
        """`count` answers to each prompt, all in one batch; each drawn by a seed of its own, whoever draws
        it."""
        prompts = [a.tokens for a in chosen for _ in range(count)]
        seeds = [seed * 1_000_033 + a.number * 4099 + k for a in chosen for k in range(count)]
        draws = [torch.Generator().manual_seed(s % (1 << 62)) for s in seeds]
        made = answer(self._model, prompts, self.recipe.max_tokens, self._ends, draws, change)
        return [made[i : i + count] for i in range(0, len(made), count)]

    def evaluate(self) -> dict[str, float]:
        """Share of answers to held-out prompts that pass."""
        return {"held_out_pass_rate": round(self.pass_rate(self.student.change(None)), 4)}

    @torch.no_grad()
    def pass_rate(self, change: Change) -> float:
        """Of answers to held-out prompts, always drawn by the same seeds."""
        passed, batch = list[float](), max(1, self.recipe.batch)
        for i in range(0, len(self._held_out), batch):
            some = self._held_out[i : i + batch]
            for a, answers in zip(some, self.draw(some, MEASURED, 1, change), strict=True):
                passed += self.passes(a, answers)
        return sum(passed) / max(1, len(passed))

    def about(self) -> dict[str, object]:
        return {"kind": "aligned", **self.student.about()}

    def kept(self) -> dict[str, Tensor]:
        """The samples that the next steps still learn from."""
        found = self._sampled
        if found is None:
            return {}
        longest = max(len(e.tokens) for e in found.examples)
        tokens = torch.full((len(found.examples), longest + 1), -1)
        for row, e in zip(tokens, found.examples, strict=True):
            row[0] = e.num_prompt
            row[1 : 1 + len(e.tokens)] = torch.tensor(e.tokens)
        return {"tokens": tokens, "advantage": found.advantage_M, "before": found.before_M}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """The file has those of one process: several sample anew."""
        if not kept or processes()[1] > 1:
            return
        rows = [row.tolist() for row in kept["tokens"]]
        examples = [Example([t for t in row[1:] if t >= 0], row[0]) for row in rows]
        device = self._model.device
        self._sampled = Sampled(examples, kept["advantage"].to(device), kept["before"].to(device))


def advantages(total_PK: Tensor, baseline: str, mean: Tensor) -> Tensor:
    """(P, K): how much better each answer is than what it is compared with. `mean`: of all that a step
    sampled, whichever process did."""
    if baseline == "none":
        return total_PK
    if baseline == "mean":
        return total_PK - mean
    count = total_PK.shape[1]
    others = (total_PK.sum(dim=1, keepdim=True) - total_PK) / (count - 1)
    return total_PK - others


def log_probs(model: TrainableModel, examples: Sequence[Example], change: Change) -> Tensor:
    """(M,) log-probability of each answer."""
    batch: Batch = collate(examples, model.device)
    z_ND = states(model, batch, change)
    logits = model.logits(z_ND).float()
    own_N = logits.gather(1, batch.label_N[:, None])[:, 0] - logits.logsumexp(dim=1)
    zero = torch.zeros(len(examples), dtype=own_N.dtype, device=own_N.device)
    return zero.index_add(0, batch.row_N, own_N)
