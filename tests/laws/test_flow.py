"""Flow and drafter law: any drafter gives the tokens of none; the flow needs no model to be tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.draft.auto import AutoDraft
from outsize.draft.drafter import Draft, Drafter, NoDraft
from outsize.draft.ngram import NgramDraft
from outsize.draft.stats import DraftStats
from outsize.draft.verify import Check, reject, rejecting, verify
from outsize.engine import decode as flow
from outsize.forward.span import Out, Span
from outsize.options import Options
from outsize.sampling.probs import Probs
from outsize.sampling.sample import Sampler

VOCAB = 7


class Script(NoDraft):
    """Guesses what it was told to, in turn."""

    def __init__(self, drafts: Sequence[Sequence[int]]) -> None:
        self.drafts = list(drafts)

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        return Draft(tuple(self.drafts.pop(0)[:most])) if self.drafts else Draft()


class World:
    """A model whose logits are a fixed function of the last two tokens; checks what it is fed."""

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.seen: list[int] = []

    def __call__(self, span: Span) -> Out:
        assert span.start <= len(self.seen), "a hole in the cache"
        self.seen[span.start :] = span.tokens
        last = range(len(self.seen) - span.want, len(self.seen))
        return Out(torch.stack([self.table[self.seen[i - 1], self.seen[i]] for i in last]))


def play(drafter: Drafter, options: Options, seed: int, ends: frozenset[int]) -> flow.Sequence:
    seq = flow.Sequence([1, 2, 3], 3, 3 + options.max_tokens, ends)
    world, life = World(seed), flow.decode(seq, (drafter, verify), Sampler(options, 11))
    try:
        span = next(life)
        while True:
            span = life.send(world(span))
    except StopIteration:
        return seq


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 50),
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), max_size=30),
    st.sampled_from([0.0, 0.8]),
    st.booleans(),
)
def test_any_drafter_gives_the_tokens_of_none(
    seed: int, drafts: list[list[int]], temperature: float, ending: bool
) -> None:
    options = Options(max_tokens=25, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0)
    ends = frozenset({4}) if ending else frozenset[int]()
    plain = play(NoDraft(), options, seed, ends)
    for drafter in (Script(drafts), NgramDraft(4), AutoDraft(DraftStats())):
        drafted = play(drafter, options, seed, ends)
        assert drafted.tokens == plain.tokens
        assert drafted.finish == plain.finish


def test_the_first_span_is_the_prompt_and_then_one_token_a_step() -> None:
    seq = flow.Sequence([5, 6, 7], 3, 6, frozenset())
    life = flow.decode(seq, (NoDraft(), verify), lambda logits, tokens: 1)
    assert next(life) == Span(0, (5, 6, 7), 1)
    assert life.send(Out(torch.zeros(1, 9))) == Span(3, (1,), 1)


def test_tokens_already_in_the_cache_are_not_run_again() -> None:
    seq = flow.Sequence([5, 6, 7], 3, 6, frozenset())
    assert next(flow.decode(seq, (NoDraft(), verify), lambda logits, tokens: 1, done=2)) == Span(
        2, (7,), 1
    )


def test_an_end_inside_a_draft_cuts_there() -> None:
    seq = flow.Sequence([1], 1, 50, frozenset({4}))
    life = flow.decode(seq, (Script([[3, 4, 5]]), verify), lambda logits, tokens: len(tokens) + 2)
    next(life)
    with pytest.raises(StopIteration):
        life.send(Out(torch.zeros(4, 9)))
    assert (seq.tokens, seq.finish) == ([1, 3], "stop")


def third(world: World) -> torch.Tensor:
    """(V,): the chances of the third new token after [1, 2, 3], summed over the two before."""
    share = world.table.double().softmax(2)
    first = share[2, 3]
    pairs = first[:, None] * share[3]  # first, second
    return (pairs[:, :, None] * share).sum((0, 1))


def test_sampling_with_drafts_draws_from_the_same_distribution() -> None:
    """Chi-square of the third token of many drafted answers against its exact chances, ten seeds."""
    random = torch.Generator().manual_seed(3)

    def scripted(sampler: Sampler, world: World) -> tuple[Drafter, Check]:
        return Script(torch.randint(VOCAB, (3, 3), generator=random).tolist()), verify

    for seed in range(10):
        p, accepted = chi_square(seed, scripted)
        assert accepted > 50
        assert p > 0.01, f"seed {seed}: p = {p}"


class Guesser(NoDraft):
    """Draws from chances that are the world's but for noise."""

    def __init__(self, sampler: Sampler, world: World) -> None:
        noise = torch.Generator().manual_seed(7)
        self.table = world.table + torch.randn(world.table.shape, generator=noise)
        self.sampler, self.drawn_from = sampler, list[Probs]()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        known, self.drawn_from = list(tokens), []
        for _ in range(min(2, most)):
            self.drawn_from.append(self.sampler.probs(self.table[known[-2], known[-1]], known))
            known.append(self.drawn_from[-1].draw(self.sampler.random))
        return Draft(tuple(known[len(tokens) :]))


def test_rejection_draws_from_the_same_distribution_and_keeps_more() -> None:
    kept = {verify: 0, reject: 0}

    def guessing(sampler: Sampler, world: World) -> tuple[Drafter, Check]:
        made = Guesser(sampler, world)
        return made, rejecting(sampler, lambda: made.drawn_from)

    def picking(sampler: Sampler, world: World) -> tuple[Drafter, Check]:
        return Guesser(sampler, world), verify

    for seed in range(10):
        p, accepted = chi_square(seed, guessing)
        kept[reject] += accepted
        kept[verify] += chi_square(seed, picking)[1]
        assert p > 0.01, f"seed {seed}: p = {p}"
    assert kept[reject] > 1.5 * kept[verify]


def chi_square(
    seed: int, made: Callable[[Sampler, World], tuple[Drafter, Check]]
) -> tuple[float, int]:
    """The third token of 600 answers against its exact chances: p, and how many guesses were kept."""
    options = Options(max_tokens=3, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    runs, counts, accepted = 600, torch.zeros(VOCAB).double(), 0
    for run in range(runs):
        seq = flow.Sequence([1, 2, 3], 3, 6, frozenset())
        account, world, sampler = (
            flow.DraftCounts(),
            World(seed),
            Sampler(options, seed * runs + run),
        )
        life = flow.decode(seq, made(sampler, world), sampler, account, 2)
        try:
            span = next(life)
            world.seen = [1, 2]
            while True:
                span = life.send(world(span))
        except StopIteration:
            counts[seq.tokens[5]] += 1
            accepted += account.accepted
    expected = third(World(seed)) * runs
    statistic = ((counts - expected) ** 2 / expected).sum()
    p = torch.special.gammaincc(torch.tensor((VOCAB - 1) / 2).double(), statistic / 2)
    return float(p), accepted
