"""Computing times: of records in turn, within the memory that is allowed; and what earlier tokens add."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.kernels.plain import PLAIN
from outsize.pack import fetch
from outsize.pack.outline import Outline, head_of, of_pack
from outsize.plan import cost
from outsize.plan.compute_times import measure, random_records
from outsize.plan.machine import Compute

SIZE = Size(4, 128, 256, 2, 1, 300, 2048)


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Outline:
    folder = tmp_path_factory.mktemp("times") / "small"
    write_folder(folder, "llama", SIZE, 1)
    return of_pack(fetch.pack(str(folder), quiet=True))


def test_records_in_turn(outline: Outline) -> None:
    """As many as there are, as fit, and one at least; apart in memory, and alike."""
    table = outline.table("ffn-0")
    all_of = random_records(table, PLAIN, 1 << 30)
    assert len(all_of) == len(table.keys) == 4
    assert len(random_records(table, PLAIN, 2 * table.stride)) == 2
    assert len(random_records(table, PLAIN, table.stride - 1)) == 1
    numbers = [next(iter(made["down"][0].fields.values())) for made in all_of]
    assert len({some.data_ptr() for some in numbers}) == 4
    assert all(torch.equal(some, numbers[0]) for some in numbers)


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_every_table_that_computes_is_timed(outline: Outline, room: int) -> None:
    made = measure(outline, PLAIN, room)
    assert {"attn-0", "ffn-0", head_of(outline.description)} == {*made.step_s}
    assert all(s > 0 for s in made.step_s.values())
    assert made.entry_s["ffn-0"] == 0
    assert 0 <= made.entry_s["attn-0"] < 1e-4


def test_more_tokens_before_it_take_longer(outline: Outline) -> None:
    """By so much each, but for those that a window has left behind."""
    steps = dict.fromkeys((t.name for t in outline.tables), 1e-3)
    made = Compute(steps, {}, 256, {"attn-0": 1e-6, "ffn-0": 0.0})
    assert cost.behind(outline, made, 256).step_s == pytest.approx(steps)
    later = cost.behind(outline, made, 1256)
    assert later.step_s == pytest.approx(steps | {"attn-0": 2e-3})
    more = cost.step_s(outline, later) - cost.step_s(outline, made)
    assert more == pytest.approx(4 * 1e-3)
    d = outline.description
    layers = tuple(replace(layer, window=456) for layer in d.layers)
    windowed = replace(outline, description=replace(d, layers=layers))
    assert cost.behind(windowed, made, 1256).step_s["attn-0"] == pytest.approx(1.2e-3)
