"""Packs of fewer bits: fitted to a text, within the budget, measured, and models of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import outsize
from outsize.adapt import calibration
from outsize.adapt.bits import Option, choose
from outsize.adapt.change import Change
from outsize.adapt.palettes import Factor, encoding_of, rounded
from outsize.adapt.repack import BitsOptions, bits_of, repack
from outsize.adapt.spill import Spill
from outsize.adapt.statistics import FIRST, WEIGHT, Inputs, States, sequences
from outsize.adapt.trainable import TrainableModel
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.checkpoint.lora import KEY
from outsize.draft import mtp_file
from outsize.draft.spec import DraftSpec
from outsize.encoding.find import ENCODINGS
from outsize.engine import open_tokens
from outsize.errors import (
    AdapterError,
    BudgetError,
    DataError,
    DiskFullError,
    OptionError,
    UnsupportedError,
)
from outsize.kernels.palettes import FORMS
from outsize.model.lora_file import additions
from outsize.pack import derive, fetch, store
from outsize.pack.format import HEADER, Pack, read_header
from outsize.pack.outline import of_pack
from outsize.pack.tables import Matrix
from outsize.progress import silent
from tests.command import outsize as outsize_here

SIZE = Size(2, 128, 256, 2, 1, 300, 1024)
TOKENS = [(7 * i * i + 3 * i + i // 11) % 290 for i in range(1300)]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Texts of less than real models need."""
    with mock.patch.multiple(calibration, TIMES=2, HELD_OUT=512):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Pack:
    folder = tmp_path_factory.mktemp("few") / "small"
    write_folder(folder, "llama", SIZE, 1)
    return fetch.pack(str(folder), quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(f"line {i} of {i * i % 97} words, {i % 7}" for i in range(400)))
    return path


def twin_of(pack: Pack) -> TrainableModel:
    return TrainableModel(pack, torch.device("cpu"), torch.float32, silent)


class Seen(Change):
    """What goes into one map."""

    def __init__(self, layer: int, name: str) -> None:
        self.where, self.rows = (layer, name), list[torch.Tensor]()

    def weight(self, w: torch.Tensor, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        if (layer, name) == self.where:
            self.rows.append(x)
        return w


@pytest.mark.parametrize("name", ["qkv", "down"])
def test_moments_are_those_of_the_inputs(base: Pack, name: str) -> None:
    """Of the second layer: as one run of the whole model has them, the first positions apart."""
    twin, start = twin_of(base), (5,)
    inputs = Inputs(twin, TOKENS, start)
    inputs.next()
    found = inputs.next()[name]
    parts = []
    for length, first in ((512, FIRST), (FIRST, 0)):
        ids, seen = sequences(TOKENS, start, length), Seen(1, name)
        if length == FIRST:
            assert len(ids) > 384
            ids = ids[:384]
        assert (ids[:, 0] == 5).all()
        States(twin, ids).ends(seen)
        x = torch.cat([r[:, first:].flatten(0, 1) for r in seen.rows])
        parts.append(x.T @ x / len(x))
    due = (1 - WEIGHT) * parts[0] + WEIGHT * parts[1]
    torch.testing.assert_close(found, due, rtol=1e-2, atol=1e-3 * float(due.abs().max()))


def test_error_feedback_lowers_the_error_of_outputs() -> None:
    """With inputs that go together; where they do not, every weight goes to its nearest level."""
    torch.manual_seed(2)
    w, mix = torch.randn(48, 256), torch.randn(256, 256)
    x = torch.randn(4096, 256) @ (mix / 16 + torch.eye(256))
    moment = x.T @ x / len(x)
    alone = Factor(torch.eye(256))

    def error(fields: dict[str, torch.Tensor], name: str) -> float:
        missed = ENCODINGS[name].decode(fields)[:48] - w
        return float(((missed @ moment) * missed).sum() / ((w @ moment) * w).sum())

    plain, fed = rounded(w, alone, 3), rounded(w, Factor(moment), 3)
    assert error(fed.fields, fed.encoding) < 0.8 * error(plain.fields, plain.encoding)
    assert fed.error == pytest.approx(error(fed.fields, fed.encoding), rel=1e-3)
    again = ENCODINGS["palette3"].encode(w)
    assert torch.equal(again["codes"], plain.fields["codes"])
    assert rounded(w, Factor(moment), 4).error < 0.4 * fed.error


def test_inputs_that_are_no_numbers_or_all_alike() -> None:
    """Moments without full rank are damped; those that are no numbers are refused."""
    w, one = torch.randn(16, 64), torch.ones(64, 64)
    assert rounded(w, Factor(one), 4).error < 0.05
    assert rounded(w, Factor(torch.zeros(64, 64)), 4).fields["codes"].any()
    with pytest.raises(DataError, match="no finite numbers"):
        Factor(one * torch.nan)
    with pytest.raises(UnsupportedError, match="96 weights are no multiple of 64"):
        encoding_of(3, 96)


def test_the_knapsack_is_the_best_choice() -> None:
    """Of all that keep the budget, where few shapes are no limit; and never more shapes than may be."""
    torch.manual_seed(4)
    names = ("qkv", "o", "gate_up", "down")

    def made(layers: int) -> dict[tuple[int, str], list[Option]]:
        return {
            (i, n): [Option(b, 100 * b, float(loss) / 4**b) for b in (2, 3, 4)]
            for i in range(layers)
            for n, loss in zip(names, torch.rand(4) + 0.1, strict=True)
        }

    options = made(1)
    for budget in (800, 900, 1200, 1500):
        picks = list(product(*options.values()))
        fit = [p for p in picks if sum(o.size for o in p) <= budget]
        best = min(sum(o.loss for o in p) for p in fit)
        chosen = choose(options, budget)
        found = sum(o.loss for k, os in options.items() for o in os if o.bits == chosen[k])
        assert best <= found <= 1.05 * best
    options = made(12)
    for budget in (10_000, 13_000, 19_200):
        chosen = choose(options, budget)
        assert budget - 400 <= sum(100 * b for b in chosen.values()) <= budget
        for a, b in (("qkv", "o"), ("gate_up", "down")):
            assert len({(chosen[i, a], chosen[i, b]) for i in range(12)}) <= 3


def test_a_pack_of_few_bits(base: Pack, text: Path) -> None:
    """Within its budget, runs as any pack, near what it was made from, measured; made once; and packs and
    files of the original stay its own."""
    made = repack(base, BitsOptions(3.5, calibrate=text, quiet=True))
    pack, q = made.pack, made.pack.quality
    assert q is not None
    assert made.minutes is not None
    assert bits_of(pack) == pytest.approx(q.bits)
    assert 3.2 < q.bits <= 3.5
    assert read_header(pack.path) == pack
    assert pack.path.name.endswith("-3.5b")
    assert {e for e in pack.encodings if e.startswith("palette")} <= set(FORMS)
    assert pack.source.kin == (base.source.sha256,)
    assert pack.source.sha256 not in (base.source.sha256, "")
    assert 0 < q.kl < 0.2
    assert q.top1 > 0.7
    for table in ("embed", "head", "final-0"):
        assert (pack.path / f"{table}.records").read_bytes() == (
            base.path / f"{table}.records"
        ).read_bytes()
    with outsize.load(str(pack.path), quiet=True) as few:
        assert few.generate("a few words", raw=True, max_tokens=5)[0].text
    four = repack(base, BitsOptions(4.5, calibrate=text, quiet=True)).pack
    assert four.quality is not None
    assert four.quality.kl < 0.6 * q.kl
    assert repack(base, BitsOptions(3.5, calibrate=text, quiet=True)).minutes is None
    assert fetch.pack(base.source.spec, quiet=True) == base
    assert store.known_hash(base.path.parent, base.source.files) == base.source.sha256
    assert "quality" not in (base.path / HEADER).read_text()
    with pytest.raises(OptionError, match=r"KL is 0\.\d+ nats at 3\.\d+ bits"):
        repack(base, BitsOptions(3.5, 1e-6, text, quiet=True))


def test_records_are_laid_out_alike(base: Pack) -> None:
    """From a pack that was just made, and from the same as it is read."""
    again = read_header(base.path)
    assert [*again.table_of("ffn-0").tensors] != [*base.table_of("ffn-0").tensors]
    headers = [
        [t.header for t in derive.tables_with(pack, lambda *_: {}, {})] for pack in (base, again)
    ]
    assert headers[0] == headers[1]


def test_the_fewest_bits_of_a_divergence(base: Pack, text: Path) -> None:
    q = repack(base, BitsOptions(None, 0.02, text, quiet=True)).pack.quality
    assert q is not None
    assert 0.003 < q.kl <= 0.02
    assert 2.2 < q.bits < 4
    with pytest.raises(OptionError, match="with the most bits that palettes have"):
        repack(base, BitsOptions(None, 1e-9, text, quiet=True))


def test_all_parts_of_a_text_are_fitted_to_and_measured(base: Pack) -> None:
    """A file that joins two texts, the first of which is long enough alone."""
    parts = ["".join(f"{word} {i % 7} {word}\n" for i in range(4000)) for word in ("abc", "XYZ")]
    with mock.patch.object(calibration, "TIMES", 8):
        found = calibration.given(base, "".join(parts), "both")
        assert len(found.tokens) == calibration.due(base.description)
    first, second = (set(open_tokens.tokens(base).encode(part)) for part in parts)
    share = sum(t in second - first for t in found.tokens) / len(found.tokens)
    assert 0.2 < share < 0.5


def test_a_text_just_long_enough(base: Pack) -> None:
    """No room for pieces apart: all of it, in its order."""
    tokens, need = (
        open_tokens.tokens(base),
        calibration.due(base.description) + calibration.HELD_OUT,
    )
    lines = ["one two three 4"] * (need // len(tokens.encode("one two three 4\n")) + 1)
    text = "\n".join(lines)
    found = calibration.given(base, text, "short")
    both = [*found.tokens, *found.held_out]
    assert sorted(both) == sorted(tokens.encode(text)[:need])


def test_its_own_text(base: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same each time, and never the part that quality is measured on."""
    monkeypatch.setattr(calibration, "LENGTH", 40)
    found = [calibration.own(base, twin_of(base), 0, silent) for _ in range(2)]
    assert found[0] == found[1]
    assert len(found[0].tokens) == calibration.due(base.description) == 2 * SIZE.ffn
    assert len(found[0].held_out) == 512
    assert found[0].text == "its own text"


def test_adapters_of_the_original(base: Pack, text: Path, tmp_path: Path) -> None:
    """A LoRA adapter is refused, a drafter is not: its tokens are verified."""
    outline = of_pack(repack(base, BitsOptions(3.5, calibrate=text, quiet=True)).pack)
    d, tensors = base.description, dict[str, torch.Tensor]()
    for i in range(d.num_layers):
        tensors[f"{i}.o.A"] = torch.zeros(1, d.num_heads * d.head_dim)
        tensors[f"{i}.o.B"] = torch.zeros(d.width, 1)
    name = f"masks-{base.source.sha256[:12]}.safetensors"
    path = tmp_path / name
    about = {"kind": "masks", "rows": "adjacent", "scale": 1.0, "k": 1, "base": base.source.sha256}
    save_file(tensors | {"masks": torch.zeros(1, d.width)}, path, {KEY: json.dumps(about)})
    file, _, masks = mtp_file.check(path, 1, outline)
    assert masks.shape == (1, d.width)
    with pytest.raises(AdapterError, match="was trained for another model"):
        additions("lora", file, outline)
    folder = base.path.parent.parent / "adapters"
    folder.mkdir(exist_ok=True)
    path.rename(folder / name)
    try:
        assert mtp_file.find(DraftSpec("mtp"), outline) == folder / name
    finally:
        (folder / name).unlink()


def test_what_cannot_be(base: Pack, text: Path, tmp_path: Path) -> None:
    for bits in (1.9, 8.1, float("nan")):
        with pytest.raises(OptionError, match=r"a number from 2.0 to 8.0 is expected"):
            BitsOptions(bits)
    with pytest.raises(OptionError, match="neither bits nor max_kl"):
        BitsOptions()
    with pytest.raises(OptionError, match=r"give --bits 2\.\d or more"):
        repack(base, BitsOptions(2.0, calibrate=text, quiet=True))
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 9)
    with pytest.raises(DataError, match=r"short.txt has 107 tokens, and this model needs 1,024"):
        repack(base, BitsOptions(3.5, calibrate=short, quiet=True))
    with pytest.raises(
        BudgetError, match=r"MB of memory while they are fitted, and 100 MB may be used"
    ):
        repack(base, BitsOptions(3.25, calibrate=text, memory="100MB", quiet=True))
    few = repack(base, BitsOptions(3.5, calibrate=text, quiet=True)).pack
    with pytest.raises(OptionError, match=r"has 3\.\d\d bits a weight already"):
        repack(few, BitsOptions(3.5, calibrate=text, quiet=True))


def test_candidates_in_a_file(tmp_path: Path) -> None:
    spill, e = Spill(tmp_path / "s"), ENCODINGS["palette3"]
    made = {k: e.encode(torch.randn(40, 256)) for k in range(3)}
    for k, fields in made.items():
        spill.put(k, Matrix("palette3", 40, 256, 0), fields)
    for k in (2, 0, 1):
        for name, field in spill.get(k).items():
            assert torch.equal(field, made[k][name])
    (tmp_path / "s").unlink()
    (tmp_path / "s").mkdir()
    with pytest.raises(DiskFullError, match="candidates cannot be kept"):
        spill.put(3, Matrix("palette3", 40, 256, 0), made[0])


def test_on_the_command_line(base: Pack, text: Path) -> None:
    words = "pack", base.source.spec, "--bits", "3.5", "--calibrate", str(text), "-q"
    done = outsize_here(*words)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "lossy" in done.stdout
    row = json.loads(outsize_here(*words, "--json").stdout)
    assert row["quality"]["bits"] <= 3.5
    assert row["minutes"] is None
    assert "bits a weight, lossy: KL" in outsize_here("list").stdout
    plan = outsize_here("plan", row["path"], "-q")
    assert "bits a weight, lossy: KL" in plan.stdout
    for flag in ("--calibrate", str(text)), ("--force",):
        refused = outsize_here("pack", base.source.spec, *flag)
        assert refused.returncode == 2
        assert "is of fewer bits" in refused.stderr
