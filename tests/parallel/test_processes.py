"""Ranks in processes of their own: the text of one rank, over each transport; who is lost or differs is a
sentence; nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import outsize
from outsize.engine.model import Model
from outsize.errors import BudgetError, OptionError, PackError, PeerError, UnsupportedError
from outsize.forward.runahead import Chain
from outsize.model_parts import Shard
from outsize.options import LoadOptions
from outsize.pack import fetch
from tests.drafts import write_peft

FAMILY, PROMPTS = "qwen2+wide", ["ab" * 12, "x", "abcabcabcabcabcabc"]
SECRET = {"OUTSIZE_SECRET": "of these tests alone"}


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def text(model: Model, **how: Any) -> list[str]:
    return [r.text for r in model.generate(PROMPTS, max_tokens=16, raw=True, **how)]


def ended(ids: list[int], within_s: float = 11.0) -> bool:
    """Are these processes gone, or dead and not yet waited for?"""
    deadline = time.monotonic() + within_s
    while any(_lives(i) for i in ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _lives(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started(*before: int) -> list[int]:
    """Children of this process that were not there."""
    return [c.pid for c in psutil.Process().children() if c.pid not in before]


@pytest.mark.parametrize(
    "parallel",
    ["tensor", "relay:over=sockets", pytest.param("tensor:over=torch", marks=pytest.mark.slow)],
)
def test_the_text_of_one_rank(
    parallel: str,
    open_tiny: Callable[..., Model],
    folder_of: Callable[[str], Path],
    few_threads: None,
) -> None:
    """A batch, drafts, drawn tokens, and the log-probability of a text."""
    one, before = open_tiny(FAMILY, "q4_0"), [c.pid for c in psutil.Process().children()]
    how = {"encoding": "q4_0", "ranks": 2, "memory": "1GB", "quiet": True, "parallel": parallel}
    with outsize.load(str(folder_of(FAMILY)), draft="ngram", **how) as model:  # type: ignore[arg-type]
        children = started(*before)
        assert len(children) == 1
        shard = model.transformer.description.shard
        assert isinstance(shard, Shard)
        assert (shard.rank, shard.world) == (0, 2)
        assert model.pack.description.shard is None
        assert text(model) == text(one)
        assert text(model, temperature=0.9, seed=7) == text(one, temperature=0.9, seed=7)
        assert model.score("ab" * 30).logprobs == one.score("ab" * 30).logprobs
        with pytest.raises(OptionError, match="lazy prompts are not run by several ranks"):
            model.generate("ab" * 30, raw=True, prefill="lazy")
    assert ended(children)


@pytest.mark.parametrize("over", ["auto", pytest.param("sockets", marks=pytest.mark.slow)])
def test_a_prompt_over_a_chain(
    over: str, open_tiny: Callable[..., Model], folder_of: Callable[[str], Path], few_threads: None
) -> None:
    """KV-Runahead: a long prompt, then a turn after it, kept prompts, drafts."""
    one, before = open_tiny(FAMILY, "q4_0"), [c.pid for c in psutil.Process().children()]
    prompts = ["abc" * 90, "abc" * 90 + "x", "ab"]
    how = {
        "encoding": "q4_0", "ranks": 2, "memory": "1GB", "quiet": True, "chunk": 32,
        "parallel": f"runahead:cuts=0.6/0.4,over={over}",
    }  # fmt: skip

    def answers(model: Model) -> list[str]:
        return [model.generate(p, max_tokens=12, raw=True)[0].text for p in prompts]

    chunk, one.transformer.chunk = one.transformer.chunk, 32
    try:
        due = answers(one)
    finally:
        one.transformer.chunk = chunk
    with outsize.load(str(folder_of(FAMILY)), draft="ngram", **how) as model:  # type: ignore[arg-type]
        children, chain = started(*before), model.scheduler.forward
        assert isinstance(chain, Chain)
        assert answers(model) == due
        assert sum(chain.cuts) > 200
        assert len(chain.cuts) == 2
        assert chain.wire.received > 0
    assert ended(children)


@pytest.mark.parametrize(
    "parallel",
    ["tensor", *(pytest.param(p, marks=pytest.mark.slow) for p in ("relay", "runahead:cuts=even"))],
)
def test_adapters(
    parallel: str, open_tiny: Callable[..., Model], folder_of: Callable[[str], Path], tmp_path: Path,
    few_threads: None,
) -> None:  # fmt: skip
    """Each rank is sent the files, and reads its part; one that comes later is refused."""
    one = open_tiny(FAMILY, "q4_0")
    folders = [write_peft(one, tmp_path / str(n), n) for n in range(2)]
    how = {
        "encoding": "q4_0", "ranks": 2, "memory": "1GB", "quiet": True, "chunk": 32,
        "parallel": parallel, "adapters": {"a": folders[0], "b": folders[1]},
    }  # fmt: skip
    prompts = ["abc" * 60, "ab", "ab"]

    def texts(model: Model) -> list[str]:
        return [
            model.generate(p, max_tokens=12, raw=True, adapter=a)[0].text
            for p in prompts
            for a in ("a", "b", None)
        ]

    with outsize.load(
        str(folder_of(FAMILY)), encoding="q4_0", quiet=True, chunk=32, threads=1,
        adapters={"a": folders[0], "b": folders[1]},
    ) as alone:  # fmt: skip
        due = texts(alone)
    assert len(set(due)) > 2, "adapters change the answer"
    with outsize.load(str(folder_of(FAMILY)), **how) as model:  # type: ignore[arg-type]
        assert texts(model) == due
        model.load_adapter("late", folders[0])
        if not parallel.startswith("runahead"):
            with pytest.raises(OptionError, match="late was loaded after the ranks were"):
                model.generate("ab", raw=True, adapter="late")


def test_a_rank_that_is_lost_is_named(folder_of: Callable[[str], Path], few_threads: None) -> None:
    before = [c.pid for c in psutil.Process().children()]
    with outsize.load(str(folder_of(FAMILY)), ranks=2, memory="1GB", quiet=True) as model:
        (child,) = started(*before)
        pieces = iter(model.stream("ab" * 12, max_tokens=400, raw=True, ignore_eos=True))
        next(pieces)
        os.kill(child, signal.SIGKILL)
        since = time.monotonic()
        with pytest.raises(PeerError, match=r"rank 1 \(127\.0\.0\.1\) (hung up|has left)") as found:
            list(pieces)
        assert found.value.rank == 1
        assert time.monotonic() - since < 11
        with pytest.raises(PeerError, match="no longer run together"):
            model.generate("x", raw=True)
    assert ended([child])


def test_experts_by_rank(
    open_tiny: Callable[..., Model], folder_of: Callable[[str], Path], few_threads: None
) -> None:
    one = open_tiny("olmoe", "bf16")
    how = {"ranks": 2, "memory": "1GB", "quiet": True, "parallel": "experts", "encoding": "bf16"}
    with outsize.load(str(folder_of("olmoe")), **how) as model:  # type: ignore[arg-type]
        assert text(model) == text(one)
        assert model.transformer.description.shard is None
    with pytest.raises(OptionError, match="ranks with different caches would choose different"):
        outsize.load(str(folder_of("olmoe")), experts="lru,routing=cached:0.2", **how)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stopped_rank_is_lost_by_its_silence(
    folder_of: Callable[[str], Path], few_threads: None
) -> None:
    before = [c.pid for c in psutil.Process().children()]
    with outsize.load(str(folder_of(FAMILY)), ranks=2, memory="1GB", quiet=True) as model:
        (child,) = started(*before)
        os.kill(child, signal.SIGSTOP)
        since = time.monotonic()
        with pytest.raises(PeerError, match=r"rank 1.*no sign of life"):
            model.generate("x", raw=True, max_tokens=4)
        assert time.monotonic() - since < 11
    assert ended([child]), "who does not end by itself is ended"


RARER = signal.SIGTERM, signal.SIGSTOP
LEADER = """
import os, sys, time, outsize
model = outsize.load(sys.argv[1], ranks=2, memory="1GB", quiet=True)
import psutil
print(*[c.pid for c in psutil.Process().children()], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in RARER)], ids=str
)
def test_ranks_end_with_their_leader(
    how: signal.Signals, folder_of: Callable[[str], Path], few_threads: None
) -> None:
    fetch.pack(str(folder_of(FAMILY)), quiet=True)
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, str(folder_of(FAMILY))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert leader.stdout is not None
        (child,) = map(int, leader.stdout.readline().split())
        assert _lives(child)
        leader.send_signal(how)
        assert ended([child], 30.0 if how == signal.SIGSTOP else 11.0)
    finally:
        leader.kill()
        leader.communicate()


def joining(port: int, home: Path | None = None, **more: str) -> subprocess.Popen[str]:
    places = {} if home is None else {"OUTSIZE_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "outsize", "join", f"127.0.0.1:{port}", "--memory", "1GB", "-q"],
        env=os.environ | SECRET | places | more, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_rank_that_comes(
    port: int, open_tiny: Callable[..., Model], folder_of: Callable[[str], Path],
    few_threads: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(*next(iter(SECRET.items())))
    other = joining(port)
    with outsize.load(
        str(folder_of(FAMILY)), ranks=2, listen=f"127.0.0.1:{port}", memory="1GB", quiet=True
    ) as model:
        assert text(model) == text(open_tiny(FAMILY, "auto"))
    assert (other.communicate(timeout=20)[1], other.returncode) == ("", 0)


@pytest.mark.parametrize(
    "parallel", ["tensor", pytest.param("runahead:cuts=even", marks=pytest.mark.slow)]
)
def test_a_rank_that_comes_again(
    parallel: str, port: int, open_tiny: Callable[..., Model], folder_of: Callable[[str], Path],
    few_threads: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One is killed in the middle of a reply; another is started in its place, and the reply goes on."""
    monkeypatch.setenv(*next(iter(SECRET.items())))
    how = {"max_tokens": 120, "raw": True, "ignore_eos": True}
    came = [joining(port)]
    try:
        with outsize.load(
            str(folder_of(FAMILY)), ranks=2, listen=f"127.0.0.1:{port}", memory="1GB", quiet=True,
            parallel=parallel, chunk=32,
        ) as model:  # fmt: skip
            pieces = model.stream("abc" * 40, **how)  # type: ignore[arg-type]
            text = next(iter(pieces))
            came[0].kill()
            came.append(joining(port))
            text += "".join(pieces)
            again = model.generate("abc" * 50, **how)[0].text  # type: ignore[arg-type]
        assert came[1].wait(timeout=20) == 0
    finally:
        for process in came:
            process.kill()
            process.communicate()
    one = open_tiny(FAMILY, "auto")
    before, one.transformer.chunk = one.transformer.chunk, 32
    try:
        due = [one.generate(p, **how)[0].text for p in ("abc" * 40, "abc" * 50)]  # type: ignore[arg-type]
    finally:
        one.transformer.chunk = before
    assert [text, again] == due


def test_a_rank_without_the_pack(
    port: int, folder_of: Callable[[str], Path], tmp_path: Path, few_threads: None,
    monkeypatch: pytest.MonkeyPatch, home: Path,
) -> None:  # fmt: skip
    """Both sides say so, before weights are read."""
    from tests.conftest import link_kernels

    monkeypatch.setenv(*next(iter(SECRET.items())))
    link_kernels(home, tmp_path / "home")
    other = joining(port, tmp_path / "home")
    with pytest.raises(PeerError, match=r"rank 1.*there is no pack here of the leader's model"):
        outsize.load(
            str(folder_of(FAMILY)), ranks=2, listen=f"127.0.0.1:{port}", memory="1GB", quiet=True
        )
    assert "there is no pack here of the leader's model" in other.communicate(timeout=20)[1]
    assert other.returncode == 1


def test_a_rank_without_memory(folder_of: Callable[[str], Path], few_threads: None) -> None:
    before = [c.pid for c in psutil.Process().children()]
    with pytest.raises(BudgetError, match="needs at least"):
        outsize.load(str(folder_of(FAMILY)), ranks=2, memory="100MB", quiet=True)
    assert ended(started(*before))


def test_what_ranks_do_not_share_is_refused(
    folder_of: Callable[[str], Path], open_tiny: Callable[..., Model]
) -> None:
    """Before any other process is started."""
    name = str(folder_of(FAMILY))
    for options, problem in (
        ({"prefill": "lazy"}, "prefill is lazy, which several ranks do not run"),
        ({"neurons": "auto"}, "neurons is auto, which several ranks"),
        ({"draft": "mtp:x"}, "draft is mtp:x, which several ranks"),
        ({"draft": "nested"}, "draft is nested, which several ranks"),
        ({"width": 0.5}, r"width is 0\.5, which several ranks"),
        ({"parallel": "tensor:cut=some"}, "cut is given once, as gather or sum"),
        ({"parallel": "tensr"}, "'tensr' is not known.*mean 'tensor'"),
        ({"parallel": "tensor:cutt=sum"}, "'cutt' is not known.*mean 'cut'"),
        ({"parallel": "tensor:cut=gather,attention=heads"}, "write cut=sum"),
        (
            {"parallel": "tensor:attention=heads", "prefix_cache": "memory"},
            "no rank has all keys of a prompt",
        ),
        ({"parallel": "tensor:cut=gather,bits=4"}, "bits=4 is for sums"),
        ({"parallel": "tensor:bits=7"}, "bits is given once, as 16 or 8"),
        ({"parallel": "relay:cut=sum"}, "'cut' is not known; known are over, link"),
        ({"parallel": "runahead:cuts=fast"}, "cuts is given once, as auto, even, or a share"),
        ({"listen": "7700"}, "is no address; HOST:PORT is expected"),
        ({"listen": "8.8.8.8:7700"}, "ranks elsewhere must share a secret"),
        ({"ranks": 65}, "a whole number from 1 to 64"),
        ({"ranks": 1, "listen": "127.0.0.1:1"}, "one rank waits for nobody"),
    ):
        with pytest.raises(OptionError, match=problem):
            outsize.load(name, **{"ranks": 2, "quiet": True, **options})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="is a mixture of experts"):
        outsize.load(str(folder_of("olmoe")), ranks=2, quiet=True)
    assert LoadOptions().ranks == 1


def test_a_shard_is_no_model(open_tiny: Callable[..., Model]) -> None:
    from outsize.parallel.split import Way
    from tests.parallel.sharded import shards_of

    (pack, _) = shards_of(open_tiny(FAMILY, "q4_0").pack, (1.0, 1.0), Way())
    with pytest.raises(PackError, match=r"is one rank's part of a model; run .* with --ranks"):
        outsize.load(str(pack.path), quiet=True)
