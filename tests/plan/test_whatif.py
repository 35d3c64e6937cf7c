"""`plan --what-if`: the outline of what would be is that of what is made; nothing is made; every wish is used
or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import pytest

from outsize.adapt import rewrite
from outsize.adapt.share_keys import queries
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.family.sharing import share_keys
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.layout import fault
from outsize.pack.outline import Outline, of_pack
from outsize.pack.source import derived
from outsize.plan import compare
from outsize.plan.compare import Comparison
from outsize.plan.fixed import stored_bytes
from outsize.plan.whatif import changed, narrowed, parse
from outsize.progress import silent
from outsize.report import whatif_page, whatif_text
from outsize.storage.records import Records
from tests.command import outsize as command

SIZE = Size(4, 128, 256, 2, 1, 300, 1024)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Pack:
    folder = tmp_path_factory.mktemp("whatif") / "small"
    write_folder(folder, "llama", SIZE, 1)
    return fetch.pack(str(folder), quiet=True)


@pytest.fixture(scope="module")
def compared(base: Pack) -> Iterator[Comparison]:
    text = "bits=3.5,width=.5,rank=4,kv=int8,share-kv=2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TRIES", 1)
        yield compare.compare(base.source.spec, LoadOptions(quiet=True), text, 64)


def layers_bits(o: Outline) -> float:
    size = weights = 0
    for t in o.tables:
        for m in (
            m for ms in t.tensors.values() for m in ms if t.kind == "layers" and m.num_rows > 1
        ):
            size += m.size * len(t.keys)
            weights += m.num_rows * m.width * len(t.keys)
    return 8 * size / weights


@pytest.mark.parametrize("bits", [2.4, 3.0, 3.5, 4.25, 6.0])
def test_bits_are_what_was_asked_for(base: Pack, bits: float) -> None:
    """No more, and little less; a sound pack's tables."""
    o = changed(of_pack(base), parse(f"bits={bits}"))
    assert bits - 0.35 < layers_bits(o) <= bits
    assert not fault(o.description, o.tables)


def test_shared_keys_are_those_of_a_shared_pack(base: Pack) -> None:
    """The same tables as the pack that is made."""
    d = share_keys(base.description, 2)
    source = derived(base.source, "shared2", {"made": "shared"})
    with Records(base) as records:
        made = rewrite.write(
            base, records, queries(records, d), d, rewrite.Identity(source), silent
        )
    foreseen = changed(of_pack(base), parse("share-kv=2"))
    shape = [(t.name, t.keys, t.stride) for t in made.tables]
    assert sorted(shape) == sorted((t.name, t.keys, t.stride) for t in foreseen.tables)
    assert stored_bytes(foreseen) == stored_bytes(of_pack(made)) == stored_bytes(of_pack(base)) // 2


def test_narrower_feed_forwards(base: Pack) -> None:
    o = changed(of_pack(base), parse("width=.5"))
    assert o.description.ffn_width == 128 == o.table("ffn-0").tensors["down"][0].width
    assert not fault(o.description, o.tables)
    assert narrowed(1536, 2 / 3) == 1024
    assert narrowed(96, 0.01) == 64
    assert narrowed(48, 0.5) == 24


def test_nothing_changes_nothing(base: Pack) -> None:
    o = of_pack(base)
    assert changed(o, parse("kv=auto")) == o


def test_both_sides_add_up(compared: Comparison, base: Pack) -> None:
    """Operations are as long as a token computes; bytes are the records'; then is less than now."""
    now, then = compared.now, compared.then
    for side in (now, then):
        whole = sum(op.s for op in side.operations)
        adapter = sum(op.s for op in side.operations if op.name == "adapter")
        assert whole - adapter == pytest.approx(side.cost.compute_s, rel=1e-6)
        assert side.token_s == pytest.approx(side.cost.token_s + adapter)
    maps = sum(op.bytes for op in now.operations if op.name.endswith("map"))
    tensors = (
        m for t in base.tables if t.kind == "layers" for ms in t.tensors.values() for m in ms
    )
    assert maps == 4 * sum(m.size for m in tensors if m.num_rows > 1)
    flop = {op.name: op.flop for op in now.operations}
    assert flop["gate and up map"] == 2 * 4 * 2 * 256 * 128
    other = {op.name: op.flop for op in then.operations}
    assert other["gate and up map"] == flop["gate and up map"] // 2
    assert other["adapter"] > 0
    assert "adapter" not in flop
    assert then.outline.size < now.outline.size
    assert then.kv_bytes < 0.6 * now.kv_bytes / 2 + 1


def test_what_is_shown(compared: Comparison) -> None:
    """The table, the page with a picture for each operation, and JSON say the same."""
    text = "\n".join(whatif_text.lines(compared))
    page = whatif_page.page(compared)
    told = json.loads(json.dumps(compared.to_json()))
    for name, _, _ in compared.pairs():
        assert name in text
        assert f"<h3>{escape(name)}</h3>" in page
    assert page.count("<svg") == len(compared.pairs())
    assert "<script" not in page
    assert "http" not in page
    assert told["then"]["weights_bytes"] == compared.then.outline.size
    assert f"{told['now']['tokens_per_s']:,.1f}" in text


def test_on_the_command_line(base: Pack, tmp_path: Path) -> None:
    words = "plan", base.source.spec, "--what-if", "bits=3", "--prompt-tokens", "64", "-q"
    page = tmp_path / "p.html"
    told = json.loads(command(*words, "--json", "--html", str(page)).stdout)
    assert told["what_if"] == "bits=3"
    assert told["then"]["weights_bytes"] < told["now"]["weights_bytes"]
    assert "what if bits=3" in page.read_text()
    refused = command(*words, "--trace", "t.jsonl")
    assert refused.returncode == 2
    assert "leaves as they are" in refused.stderr
    assert "is of one process" in command(*words, "--ranks", "2").stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bit=3", "'bit' is not known"),
        ("bits", "'bits' has no value"),
        ("bits=3,bits=4", "'bits' is given twice"),
        ("bits=9", "a number from 2 to 8 is expected"),
        ("width=0", "above 0 and up to 1"),
        ("rank=2.5", "a whole number is expected"),
        ("kv=int4", "int8 or auto is expected"),
        ("share-kv=0", "a number from 1 to"),
    ],
)
def test_wishes_that_are_none(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse(text)


def test_wishes_that_cannot_be(base: Pack, open_tiny: Callable[..., Model]) -> None:
    o = of_pack(base)
    with pytest.raises(OptionError, match="from 1 to 3 can"):
        changed(o, parse("share-kv=4"))
    with pytest.raises(OptionError, match="the narrowest map has 64"):
        changed(o, parse("rank=65"))
    with pytest.raises(OptionError, match=r"smallest palettes take 2\.\d\d"):
        changed(o, parse("bits=2"))
    mixture = of_pack(open_tiny("olmoe").pack)
    with pytest.raises(UnsupportedError, match="are for dense models"):
        changed(mixture, parse("bits=4"))
    assert changed(mixture, parse("kv=int8")).kv == "int8"
