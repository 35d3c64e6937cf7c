"""Steps as drafting makes them, for the replay of neurons."""

from __future__ import annotations

from itertools import pairwise

from experiments.memory.neurons_steps import ACCEPTED, ROWS, drafted_steps


def test_what_is_rejected_is_not_what_comes_next() -> None:
    """The accepted rows are the text, once; the others are none of the next step's."""
    trace = [[[i]] for i in range(60)]
    steps = drafted_steps(trace)
    said = [token for step in steps for token in step[:ACCEPTED]]
    assert said == trace[: len(said)]
    for step, after in pairwise(steps):
        assert len(step) == ROWS
        assert not any(token in after for token in step[ACCEPTED:])
