"""The simulator of ranks: against arithmetic, and against the same programs run for real."""

from __future__ import annotations

import pytest

from outsize.parallel.des import Compute, Program, Receive, Send, Stops, play, simulate
from outsize.parallel.programs import Layer, Prompt, Tensor, alone, gathered, relay, runahead
from outsize.parallel.slow import Link, Slow
from outsize.parallel.transport import Transport, threads
from tests.parallel.ranks import on_all

LINK = Link(1e-4, 12.5e6)
QWEN = Prompt(4.49e-3, 1.43e-6, 24, 512, 1792)  # about a 0.5B model on one core


def ends(programs: list[Program], link: Link = LINK, call_s: float = 0.0) -> list[float]:
    return [outcome.end for outcome in simulate(programs, link, call_s)]


def test_one_message() -> None:
    got = simulate([[Compute(1.0), Send(1, 1000)], [Receive(0, 1000)]], LINK, 0.01)
    on_wire = LINK.duration(1000)
    assert got[0].end == pytest.approx(1.01)
    assert got[1].end == pytest.approx(1.01 + on_wire + 1e-4 + 0.01)
    assert got[1].waited == pytest.approx(1.01 + on_wire + 1e-4)
    assert (got[0].sent, got[0].messages, got[0].computed) == (1000, 1, 1.0)


def test_messages_queue_on_a_link_and_computing_goes_on() -> None:
    programs: list[Program] = [
        [Send(1, 125_000), Send(1, 125_000), Compute(0.5)],
        [Receive(0, 125_000), Receive(0, 125_000)],
    ]
    once = LINK.duration(125_000)
    assert ends(programs) == pytest.approx([0.5, 2 * once + 1e-4])


def test_a_rank_that_stands_again_and_again() -> None:
    stops = Stops(0.3, 0.1)
    assert stops.after(0.0, 0.2) == pytest.approx(0.2)
    assert stops.after(0.1, 0.5) == pytest.approx(0.8), "0.2, a stop, 0.3, a stop"
    assert stops.after(0.35, 0.1) == pytest.approx(0.5), "it begins when it goes again"
    assert stops.after(0.35, 0.0) == pytest.approx(0.4), "it sees what came when it goes again"
    programs: list[Program] = [[Compute(0.5), Send(1, 1000)], [Receive(0, 1000), Compute(0.1)]]
    on_wire = LINK.duration(1000) + 1e-4
    got = simulate(programs, LINK, stops={0: stops})
    assert [o.end for o in got] == pytest.approx([0.6, 0.7 + on_wire])
    assert got[0].computed == pytest.approx(0.5)


def test_ranks_that_wait_for_each_other() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Receive(1, 1), Send(1, 1)], [Receive(0, 1), Send(0, 1)]], LINK)


def test_tensor_steps() -> None:
    """A step of one message: layers * (work + syncs * message)."""
    base = Tensor(24, Layer(1e-4, 4e-4), 1792, last_s=1e-3)
    message = LINK.duration(1792) + 1e-4

    def end(t: Tensor) -> float:
        return ends([t.program(r, 2) for r in range(2)])[0]

    assert end(base) == pytest.approx(24 * (5e-4 + 2 * message) + 1e-3)
    whole = Tensor(24, Layer(2e-4, 4e-4), 1792, whole=True)
    assert end(whole) == pytest.approx(24 * (6e-4 + message))
    dropped = Tensor(24, Layer(1e-4, 4e-4), 1792, dropped=range(6))
    assert end(dropped) == pytest.approx(24 * 5e-4 + (48 - 6) * message)
    counted = simulate([dropped.program(r, 3) for r in range(3)], LINK)
    assert {o.messages for o in counted} == {2 * (48 - 6)}


def test_overlap_hides_the_lesser_of_two() -> None:
    def end(overlap: bool) -> float:
        t = Tensor(10, Layer(0.1, 0.1), 250_000, chunks=8, overlap=overlap)
        return ends([t.program(r, 2) for r in range(2)])[0]

    work, wire = 10 * 2 * 8 * 0.1, 10 * 2 * 8 * LINK.duration(250_000)
    assert end(False) == pytest.approx(work + wire, rel=0.01)
    assert work < end(True) < work + wire / 8 * 1.1


def test_a_chain_with_a_fast_link_takes_what_its_busiest_rank_does() -> None:
    fast = Link(0.0, 1e12)
    cuts = [2340, 1756]
    work = [QWEN.seconds(0, cuts[0]), QWEN.seconds(cuts[0], cuts[1])]
    got = ends([runahead(QWEN, cuts, r) for r in range(2)], fast)
    assert max(work) <= got[1] <= max(work) * 1.05
    assert ends([alone(QWEN, 4096)]) == pytest.approx([QWEN.seconds(0, 4096)])
    slower = ends([runahead(QWEN, cuts, r, speed=0.5) for r in range(2)], fast)
    assert slower[1] == pytest.approx(2 * got[1])


def test_bytes_of_a_chain_are_the_formula() -> None:
    cuts = [1536, 1024, 1536]
    got = simulate([runahead(QWEN, cuts, r) for r in range(3)], LINK)
    assert sum(o.sent for o in got) == QWEN.kv_bytes * QWEN.layers * (1536 + 2560)


def test_baselines() -> None:
    """All-gather moves twice a chain's bytes; zigzag shares the pairs; a relay halves the work of each."""
    world, tokens = 2, 4096
    even = simulate([runahead(QWEN, [2048, 2048], r) for r in range(2)], LINK)
    for zigzag in (False, True):
        got = simulate([gathered(QWEN, tokens, r, world, zigzag) for r in range(2)], LINK)
        assert sum(o.sent for o in got) == 2 * sum(o.sent for o in even)
        assert sum(o.computed for o in got) == pytest.approx(QWEN.seconds(0, tokens))
    uneven = [o.computed for o in simulate([gathered(QWEN, tokens, r, 2) for r in range(2)], LINK)]
    fair = [
        o.computed for o in simulate([gathered(QWEN, tokens, r, 2, True) for r in range(2)], LINK)
    ]
    assert uneven[1] > 1.1 * uneven[0]
    assert fair[1] == pytest.approx(fair[0])
    piped_back = relay(QWEN, tokens, 1, 2, wanted=300)
    backs = [op.size for op in piped_back if isinstance(op, Send)]
    assert backs == [44 * QWEN.row_bytes, 256 * QWEN.row_bytes]
    piped = simulate([relay(QWEN.part(1 / 2), tokens, r, 2) for r in range(2)], LINK)
    assert [o.computed for o in piped] == pytest.approx([QWEN.seconds(0, tokens) / 2] * 2)
    assert piped[1].end < 0.6 * QWEN.seconds(0, tokens)


def test_a_program_played_takes_as_long() -> None:
    """Slept, so that a busy machine does not matter much; within a tenth."""
    link = Link(0.004, 2e6)
    small = Prompt(1e-3, 2e-6, 4, 512, 512)
    cases: list[list[Program]] = [
        [runahead(small, [150, 100], r) for r in range(2)],
        [gathered(small, 250, r, 2) for r in range(2)],
        [relay(small.part(1 / 2), 250, r, 2, 64) for r in range(2)],
    ]
    for programs in cases:
        wanted = max(ends(programs, link))

        def run(t: Transport, programs: list[Program] = programs) -> float:
            return play(programs[t.rank], Slow(t, link), spin=False)

        got = min(max(on_all(threads(2), run)) for _ in range(3))
        assert wanted * 0.98 < got < wanted * 1.1
