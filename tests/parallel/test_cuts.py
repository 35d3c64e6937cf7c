"""Where prompts are cut for a chain: balanced work, what the simulator finds best, searches, tables."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from outsize.errors import OptionError
from outsize.parallel.cuts import (
    Choice,
    Costs,
    Cuts,
    Table,
    balanced,
    even,
    keep,
    predict,
    read_table,
    search,
    whole,
)
from outsize.parallel.programs import Prompt
from outsize.parallel.slow import Link
from outsize.parallel.spec import parse_parallel

FAST, SLOW = Link(1e-5, 1e9), Link(1e-4, 25e6 / 8)
PROMPT = Prompt(1e-3, 3.3e-7, 30, 768, 2304)


def costs(link: Link = FAST, *speeds: float) -> Costs:
    return Costs(PROMPT, link, speeds or (1.0, 1.0))


def test_whole_units_for_everyone() -> None:
    assert whole(8, (0.62, 0.38)) == (5, 3)
    assert whole(3, (0.98, 0.01, 0.01)) == (1, 1, 1)
    assert whole(10, (1, 1000)) == (1, 9)
    assert even(8, 3) == (3, 3, 2)
    dice = random.Random(2)
    for _ in range(200):
        ranks = dice.randint(1, 6)
        units = dice.randint(ranks, 40)
        cuts = whole(units, [dice.random() + 1e-3 for _ in range(ranks)])
        assert sum(cuts) == units
        assert min(cuts) >= 1
        assert len(cuts) == ranks


def test_balanced_work_is_alike() -> None:
    """The paper's note: attention alone, two ranks: .618 and .382; four: .401 .248 .191 .161."""
    only = Costs(Prompt(1e-12, 1.0, 1, 1, 1), FAST, (1.0, 1.0))
    assert balanced(1000, 1, only) in ((707, 293), (708, 292))  # causal: rows see half of their own
    assert balanced(100, 1, Costs(Prompt(1.0, 0.0, 1, 1, 1), FAST, (1.0, 3.0))) == (25, 75)
    first, last = balanced(64, 64, costs())
    work = PROMPT.seconds(0, first * 64), PROMPT.seconds(first * 64, last * 64)
    assert work[0] == pytest.approx(work[1], rel=0.05)
    assert first > last


def test_a_search_finds_what_is_best() -> None:
    asked: list[Cuts] = []

    def seconds(cuts: Cuts) -> float:
        asked.append(cuts)
        return abs(cuts[0] - 37) + 0.1 * cuts[1]

    found, best = search((10, 54), seconds)
    assert (found, best) == ((37, 27), pytest.approx(2.7))
    assert len(asked) == len(set(asked)) < 25
    every = {(n, 64 - n): costs(SLOW).seconds(0, 64, (n, 64 - n)) for n in range(1, 64)}
    predicted = predict(0, 64, 64, costs(SLOW))
    assert every[predicted] <= 1.01 * min(every.values())


def test_slow_links_move_tokens_to_the_end() -> None:
    fast, slow = (predict(0, 64, 64, costs(link)) for link in (FAST, SLOW))
    assert slow[0] < fast[0]
    assert predict(0, 64, 64, costs(FAST, 1.0, 2.0))[0] < fast[0], "and fast ranks have more"
    three = predict(0, 64, 64, costs(FAST, 1.0, 1.0, 1.0))
    assert three[0] > three[1] > three[2]
    assert predict(8192, 64, 64, costs())[0] <= fast[0], "after a long prefix work is nearly even"


def test_a_choice() -> None:
    assert Choice("even", costs())(0, 9, 64) == (5, 4)
    assert Choice((0.75, 0.25), costs())(0, 8, 64) == (6, 2)
    assert Choice("auto", costs())(0, 64, 64) == predict(0, 64, 64, costs())
    never = Costs(PROMPT, Link(1.0, 1e3), (1.0, 1.0))
    assert Choice("auto", never)(0, 64, 64) is None
    assert Choice("even", never)(0, 64, 64) == (32, 32), "who asks for it gets it"
    table = Table({2048: (0.5, 0.5), 4096: (0.75, 0.25)})
    assert Choice("auto", costs(), table)(0, 64, 64) == (48, 16)
    assert Choice("auto", costs(), table)(0, 128, 64) == predict(0, 128, 64, costs())


def test_tables_are_interpolated_and_kept(tmp_path: Path) -> None:
    table = Table({1024: (0.5, 0.5), 2048: (0.6, 0.4)})
    assert table.at(1536) == pytest.approx((0.55, 0.45))
    assert table.at(1024) == (0.5, 0.5)
    assert table.at(1000) is None
    assert table.at(3000) is None
    file = tmp_path / "new" / "cuts.json"
    assert read_table(file, "a") is None
    keep(file, "a", table)
    keep(file, "b", Table({64: (1.0,)}))
    assert read_table(file, "a") == table
    assert read_table(file, "c") is None
    for bad in ("", "[]", '{"a": 3}', '{"a": [[1, "x"]]}', '{"a": [[1]]}'):
        file.write_text(bad)
        assert read_table(file, "a") is None
    keep(file, "a", table)
    assert read_table(file, "a") == table


def test_specs() -> None:
    assert parse_parallel("runahead").cuts == "auto"
    spec = parse_parallel("runahead:cuts=0.6/0.4,over=sockets")
    assert spec.shares == (0.6, 0.4)
    assert parse_parallel(str(spec)) == spec
    for bad in ("0/1", "-1/2", "x", "0.5/", "inf/1", "nan/1"):
        with pytest.raises(OptionError, match="a share for each rank"):
            parse_parallel(f"runahead:cuts={bad}")
    with pytest.raises(OptionError, match="'bits' is not known; known are cuts, over, link"):
        parse_parallel("runahead:bits=4")
