"""The load test against real servers with a tiny model: what each load finds."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outsize.bench.serve import hostile, show, trials
from outsize.bench.serve.bench import Bench
from outsize.bench.serve.client import Address, Exchange
from outsize.bench.serve.hostile import Case, cases, damaged, mutants
from outsize.bench.serve.options import ServeOptions
from outsize.bench.serve.process import Memory, Server, free_port, listener
from outsize.errors import OptionError, UnavailableError
from outsize.options import LoadOptions
from tests.command import outsize
from tests.serve.conftest import Running, Serving

SMALL = ServeOptions(
    prompt_tokens=40, new_tokens=6, long_tokens=160, streams="3", requests=3, seconds=0.5, chat=True
)
Row = dict[str, Any]


def measured(served: Running, **changes: Any) -> list[Row]:
    async def run() -> list[Row]:
        bench = Bench(replace(SMALL, url=served.url, **changes))
        await bench.start()
        return [row async for row in show.measure(bench)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("load", "requests"),
    [("one", 3), ("many", 3), ("batch", 3), ("long", 5), ("idle", 3), ("prefix", 8), ("bits", 3)],
)
def test_each_load_says_what_it_found(load: str, requests: int, served: Running) -> None:
    (row,) = measured(served, loads=load)
    assert (row["errors"], row["good"], row["requests"]) == ({}, True, requests)
    assert row["new_tokens"] >= 2 * requests
    first = row["first_token_s"]
    assert 0 < first["p50"] <= first["p95"] <= first["p99"] <= row["seconds"]
    if load == "long":
        assert row["long_tokens"] == pytest.approx(160, rel=0.2)
        assert row["alone_first_s"] > 0
    if load in ("one", "many"):
        assert row["prompt_tokens"] == pytest.approx(40, rel=0.5)
    if load == "bits":
        assert (row["differ_company"], row["differ_later"]) == (0, 0)
        assert "differ_no_drafts" not in row, "the server is not ours to start again"
    told = show.lines(row)
    assert told[0].split()[:3] == [load, "3", str(requests)]
    assert "NOT GOOD" not in told[0]


def test_streams_and_repeats_are_measured_in_turn(served: Running) -> None:
    rows = measured(served, loads="many", streams="1,2", repeats=2, requests=2)
    assert [(r["streams"], r["turn"]) for r in rows] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert [r["requests"] for r in rows] == [2, 2, 2, 2]


def test_a_soak_ends_in_time_and_tells_of_memory(served: Running) -> None:
    (row,) = measured(served, loads="soak")
    assert row["good"]
    assert row["requests"] >= 3
    assert 0.5 <= row["seconds"] < 30
    assert row["group_peak_bytes"] is None, "the server is this process"
    assert row["memory_bytes"] == pytest.approx(Memory(os.getpid()).sample(), rel=0.2)


def test_requests_left_at_random_change_nothing(served: Running) -> None:
    (row,) = measured(served, loads="disconnects", requests=40)
    assert (row["errors"], row["same_text"]) == ({}, True)
    assert 0 < row["left"] <= 40
    served.until(lambda: not served.load().running, "nothing runs")


def test_overload_is_refused_at_once(serve: Serving) -> None:
    running = serve(max_queue=4).until_ready()
    (row,) = measured(running, loads="overload", requests=40, new_tokens=50, chat=False)
    assert (row["errors"], row["good"]) == ({}, True)
    assert row["refused"] == row["with_retry_after"] > 20
    assert row["refused"] < row["requests"] == 40


def test_hostile_requests_are_all_answered(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "LONG", 20_000)
    (row,) = measured(served, loads="hostile", requests=250)
    assert row["requests"] == 250
    assert row["same_text"]
    assert (row["bad"], [s for s in row["statuses"] if s.startswith("5")]) == ([], [])


def test_hostile_requests_are_what_they_are_called() -> None:
    address = Address("127.0.0.1", 80)
    listed = list(cases(address, "m"))
    assert len({case.name for case in listed}) == len(listed) > 100
    draw = random.Random(1)
    for make in (mutants, damaged):
        found = [case.data for case, _ in zip(make(address, "m", draw), range(50), strict=False)]
        assert len(set(found)) > 30
    assert any(b"\\ud800" in case.data for case in listed)


def test_what_is_not_a_refusal() -> None:
    case = Case("a", b"")
    for status, good in ((200, False), (400, True), (413, True), (500, False), (0, False)):
        assert trials.is_refusal(case, Exchange(status=status)) is good
    assert trials.is_refusal(Case("a", b"", may_close=True), Exchange())
    assert trials.is_refusal(Case("a", b"", is_sound=True), Exchange(status=200))


def test_a_load_that_takes_too_long_is_ended(served: Running) -> None:
    (row,) = measured(served, loads="idle", requests=1000, limit=0.3)
    assert (row["good"], row["errors"]) == (False, {"not done in time": 1})
    assert show.lines(row) == ["        idle       3  not done in 0.3 s"]


def test_the_command_starts_a_server_beside_the_model(folder_of: Callable[[str], Path]) -> None:
    flags = "--chat --in-process --json --loads one --streams 2 --requests 2 --prompt-tokens 40 "
    flags += "--new-tokens 4 --context 400 --wrap nice"
    done = outsize("bench", "serve", str(folder_of("llama")), *flags.split())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # the server's own log is there, too
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["same_texts"], row["requests"], len(row["ratios"])) == (True, 2, 2)
    assert row["in_process_tokens_per_s"] > 0
    assert row["most_bytes"] >= row["memory_bytes"] > 10e6
    assert row["peak_rss_bytes"] > row["memory_bytes"]


@pytest.mark.slow
def test_the_same_bits_without_drafts(folder_of: Callable[[str], Path]) -> None:
    """Starts the server three times."""
    flags = ["--context=300", "-q"]
    bench = Bench(
        replace(SMALL, loads="bits"),
        lambda more: Server.of_outsize(str(folder_of("llama")), [*flags, *more]),
    )

    async def run() -> list[Row]:
        await bench.start()
        return [row async for row in show.measure(bench)]

    try:
        (row,) = asyncio.run(run())
    finally:
        status = bench.close()
    assert (row["good"], row["differ_no_drafts"], status) == (True, 0, 0)


def test_a_server_that_ends_is_told_of() -> None:
    words = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
    bench = Bench(SMALL, lambda more: Server(words, Address("127.0.0.1", free_port())))
    with pytest.raises(UnavailableError, match="ended with status 3; its last words: no room"):
        asyncio.run(bench.start())
    assert bench.close() == 3


def test_a_server_that_does_not_end_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True)"
    code += "; time.sleep(60)"
    server = Server([sys.executable, "-c", code], Address("127.0.0.1", free_port()))
    while not server.words():
        server.check()
    assert server.stop(0.1) == -signal.SIGKILL
    assert server.stop() == -signal.SIGKILL


def test_nobody_at_the_url() -> None:
    with pytest.raises(UnavailableError, match=r"no server answers at 127\.0\.0\.1:9"):
        show.show("", ServeOptions(url="http://127.0.0.1:9"), LoadOptions(), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": "0"}, "streams is '0'; numbers from 1 to 1,024"),
        ({"streams": "a"}, "streams is 'a'"),
        ({"requests": -1}, "requests is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"url": "http://a", "wrap": "nice"}, "leave them out, or url"),
    ],
)
def test_options_are_checked(changes: Row, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ServeOptions(**changes)


def test_loads_are_checked() -> None:
    with pytest.raises(OptionError, match="did you mean 'many'"):
        ServeOptions(loads="one,manny").load_names(show.LOADS)
    assert ServeOptions(loads="all").load_names(show.LOADS) == list(show.LOADS)
    with pytest.raises(OptionError, match="long_tokens is 4,000"):
        show.show("m", ServeOptions(), LoadOptions(context=512), True)


def test_memory_of_a_process_and_its_slope(served: Running) -> None:
    host, port = served.address
    assert listener(Address(host, port)) == os.getpid()
    assert listener(Address("192.0.2.1", port)) is None
    memory = Memory(os.getpid())
    before = memory.sample() or 0
    block = bytearray(os.urandom(1 << 20) * 32)
    assert (memory.sample() or 0) - before > len(block) / 2
    assert Memory(None).sample() is None
    memory.samples[:] = [(t, 100 + 5 * max(0, t - 3)) for t in range(12)]
    assert memory.slope() == pytest.approx(5)
    memory.samples[:] = [(0, 1), (1, 2)]
    assert math.isnan(memory.slope())
