"""The law of policies: slots distinct, an id asked for now never evicted now, hits never above
Belady's, CapacityError exactly when a request cannot fit; and each equals its textbook definition."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize import registry
from outsize.caching import eviction
from outsize.caching.policy import Hints, Policy, make
from outsize.errors import CapacityError, UnsupportedError

NAMES = registry.names(eviction)
IDS, CAPACITY = 12, 5
requests = st.lists(st.integers(0, IDS - 1), min_size=1, max_size=3)
traces = st.lists(requests, min_size=1, max_size=40)


def hints(trace: list[list[int]], pinned: tuple[int, ...] = (3, 7)) -> Hints:
    return Hints(pinned=pinned, future=trace)


def hits(policy: Policy, trace: list[list[int]]) -> int:
    return sum(len(set(ids)) - len(policy.place(ids).loads) for ids in trace)


def test_there_are_policies() -> None:
    assert {"pin_and_ring", "lru", "fifo", "lfu", "belady"} <= set(NAMES)
    with pytest.raises(UnsupportedError, match="did you mean 'lru'"):
        make("lrru", 3, Hints())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(trace=traces)
def test_slots(name: str, trace: list[list[int]]) -> None:
    """A map kept beside the policy, from its loads alone, always agrees with what it says."""
    policy = make(name, CAPACITY, hints(trace))
    content: dict[int, int] = {}  # slot -> id
    for ids in trace:
        placed = policy.place(ids)
        written = [slot for _, slot in placed.loads]
        assert len(written) == len(set(written))
        assert all(0 <= slot < CAPACITY for slot in placed.slots.values())
        assert not {content.get(slot) for slot in written} & set(ids), "evicted what is asked for"
        content |= {slot: i for i, slot in placed.loads}
        assert list(placed.slots) == list(dict.fromkeys(ids))
        assert {content[slot]: slot for slot in placed.slots.values()} == placed.slots


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(trace=traces)
def test_never_above_belady(name: str, trace: list[list[int]]) -> None:
    best = hits(make("belady", CAPACITY, hints(trace)), trace)
    assert hits(make(name, CAPACITY, hints(trace)), trace) <= best


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(trace=traces, ids=st.lists(st.integers(0, IDS - 1), min_size=1, max_size=8))
def test_capacity(name: str, trace: list[list[int]], ids: list[int]) -> None:
    policy = make(name, CAPACITY, hints([*trace, ids]))
    for earlier in trace:
        policy.place(earlier)
    ring = [i for i in set(ids) if i not in (3, 7)]
    fits = len(ring) <= CAPACITY - 2 if name == "pin_and_ring" else len(set(ids)) <= CAPACITY
    if fits:
        policy.place(ids)
    else:
        with pytest.raises(CapacityError, match="records are wanted at once"):
            policy.place(ids)
        policy.place(ids[:1])  # and nothing was broken


places = st.sets(st.integers(0, CAPACITY - 1), max_size=2)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(requests, places, st.integers(0, IDS - 1)), min_size=3, max_size=20)
)
def test_what_is_kept_stays(name: str, steps: list[tuple[list[int], set[int], int]]) -> None:
    """Whichever of the residents must be kept, the next to be evicted or not, while one is read ahead."""
    policy = make(name, CAPACITY, hints([ids for ids, _, _ in steps]))
    content: dict[int, int] = {}
    for ids, slots, ahead in steps:
        content |= {slot: i for i, slot in policy.place(ids).loads}
        kept = {content[slot] for slot in slots if slot in content}
        loads = policy.place([ahead], kept, ahead=True).loads
        assert not {content.get(slot) for _, slot in loads} & kept
        content |= {slot: i for i, slot in loads}


def reference(name: str, trace: list[int]) -> int:
    """Hits of single requests, by sets and scans, as a textbook has it."""
    inside: list[int] = []
    count: Counter[int] = Counter()
    last: dict[int, int] = {}
    found = 0
    for now, i in enumerate(trace):
        count[i] += 1
        if i in inside:
            found += 1
        else:
            if len(inside) == CAPACITY:
                victims = {
                    "fifo": inside[0],
                    "lru": min(inside, key=lambda v: last[v]),
                    "lfu": min(inside, key=lambda v: (count[v], last[v])),
                }
                inside.remove(victims[name])
            inside.append(i)
        last[i] = now
    return found


@pytest.mark.parametrize("name", ["fifo", "lru", "lfu"])
@settings(max_examples=100, deadline=None)
@given(trace=st.lists(st.integers(0, IDS - 1), min_size=1, max_size=80))
def test_against_sets(name: str, trace: list[int]) -> None:
    assert hits(make(name, CAPACITY, Hints()), [[i] for i in trace]) == reference(name, trace)


@settings(max_examples=25, deadline=None)
@given(trace=st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_belady_is_the_best_there_is(trace: list[int]) -> None:
    """Against every choice of victim, tried out."""

    def best(at: int, inside: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        i = trace[at]
        if i in inside:
            return 1 + best(at + 1, inside)
        if len(inside) < 2:
            return best(at + 1, inside | {i})
        return max(best(at + 1, inside - {v} | {i}) for v in inside)

    single = [[i] for i in trace]
    assert hits(make("belady", 2, Hints(future=single)), single) == best(0, frozenset())


def test_a_cyclic_scan() -> None:
    """Why there is pin_and_ring: of a scan of 12 through 5 slots it hits 4 a turn, LRU none."""
    scan = [[i] for _ in range(10) for i in range(IDS)]
    pinned = Hints(pinned=(0, 3, 6, 9))
    assert hits(make("pin_and_ring", CAPACITY, pinned), scan) == 9 * 4
    assert hits(make("lru", CAPACITY, Hints()), scan) == 0
