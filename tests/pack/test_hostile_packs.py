"""Packs travel: a header may say anything, and has the checksum that it needs to have."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import outsize
from outsize.engine import open_tokens
from outsize.engine.model import Model
from outsize.errors import CheckpointError, OptionError, PackError, ReadError
from outsize.family.find import recipe
from outsize.pack import fetch, layout, tokenizer_file
from outsize.pack.format import HEADER, read_header
from outsize.pack.outline import of_pack
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from tests.golden import tiny
from tests.golden.test_golden import write_gguf
from tests.hostile_packs import whole

ROOT = Path(__file__).parents[2]


def mutated(pack: Path, *count: int) -> dict[str, int]:
    """In a process of its own, which may grow by 300 MB."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_packs", str(pack), *map(str, count)],
        capture_output=True, text=True, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, int] = json.loads(done.stdout)
    assert set(result) <= {"PackError", "sound", "BudgetError", "ContextError"}
    return result


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("gpt_oss", (300,)),
        *(pytest.param(f, (), marks=pytest.mark.slow) for f in ("gemma3", "olmoe")),
    ],
)
def test_lying_headers_give_only_our_errors(
    family: str, count: tuple[int, ...], folder_of: Callable[[str], Path]
) -> None:
    found = mutated(fetch.pack(str(folder_of(family)), quiet=True).path, *count)
    assert found["PackError"] > 10 * found["sound"] > 100


@pytest.mark.parametrize("count", [(300,), pytest.param((), marks=pytest.mark.slow)])
def test_lying_headers_of_quantized_packs(count: tuple[int, ...], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", quantized="Q4_0")
    assert mutated(fetch.pack(str(path), quiet=True).path, *count)["PackError"] > 250


@pytest.fixture
def lie(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a pack with some of its description, or of the whole, changed."""
    pack = fetch.pack(str(folder_of("qwen3")), quiet=True).path

    def change(at: str = "", **changes: Any) -> Path:
        folder = shutil.copytree(pack, tmp_path / "copy")
        body = json.loads((folder / HEADER).read_text())["pack"]
        (body[at] if at else body).update(changes)
        (folder / HEADER).write_text(whole(body))
        return folder

    return change


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("num_heads", 400, "tensor 'qkv' has 256 x 64 numbers, 12,928 x 64 are due"),
        ("num_kv_heads", 3, "4 heads over 3 key heads"),
        ("head_dim", 31, "heads must divide evenly and have an even size"),
        ("vocab_size", 100_000, "table embed holds 288 rows in blocks of 320"),
        (
            "width",
            1 << 40,
            r"width is 1,099,511,627,776, a whole number from 1 to 16,777,216 is due",
        ),
        ("norm_eps", 0.0, "norm_eps is 0.0, a number from 1e-20 to 1.0 is due"),
        ("num_heads", 4.0, r"description.num_heads is 4.0, a whole number is due"),
        ("qk_norm", 1, r"description.qk_norm is 1, true or false is due"),
        ("activation", "clamped_swiglu", "the activation is 'clamped_swiglu'"),
        ("more", 1, "description has a key 'more' that is not known"),
    ],
)
def test_a_description_that_lies_is_refused(
    lie: Callable[..., Path], name: str, value: object, problem: str
) -> None:
    with pytest.raises(PackError, match=problem):
        outsize.load(str(lie("description", **{name: value})), quiet=True)


def test_token_ids_beyond_the_embedding_are_refused(lie: Callable[..., Path]) -> None:
    with pytest.raises(
        PackError, match="token 288 starts or ends a text, and the embedding has 288 rows"
    ):
        read_header(lie(eos=[5, 288]))


def test_prompt_ids_outside_of_the_embedding_are_refused(open_tiny: Callable[..., Model]) -> None:
    for id in (-1, 288, 1 << 40):
        with pytest.raises(
            OptionError, match=f"number {id:,}, and the model's embedding has 288 rows"
        ):
            open_tiny("qwen3").score_tokens([5, id, 6])


def test_a_tokenizer_that_lies_is_refused(lie: Callable[..., Path]) -> None:
    for number, text in enumerate((b"{", b"\xff", b"[]", b'{"model": 7}', b"[" * 99_999)):
        folder = lie(tokenizer_crc=zlib.crc32(text))
        tokenizer_file.write(folder, text)
        with pytest.raises(PackError, match="its tokenizer cannot be read"):
            open_tokens.tokens(read_header(folder))
        shutil.move(folder, folder.with_name(str(number)))


def test_a_tokenizer_file_that_lies_about_its_length_is_refused(lie: Callable[..., Path]) -> None:
    folder = lie()
    path, text = folder / tokenizer_file.NAME, tokenizer_file.read(folder)
    bomb = gzip.compress(bytes(1 << 28))[:-4] + (100).to_bytes(4, "little")
    short = gzip.compress(text)[:-4] + (len(text) + 1).to_bytes(4, "little")
    for data in (bomb, short, path.read_bytes()[:-9], b"no gzip", path.read_bytes()[:2]):
        path.write_bytes(data)
        with pytest.raises(PackError, match=r"its tokenizer does not match|missing or too long"):
            open_tokens.tokens(read_header(folder))


def test_a_pack_of_before_has_its_tokenizer_as_it_is(lie: Callable[..., Path]) -> None:
    folder = lie()
    (folder / tokenizer_file.PLAIN).write_bytes(tokenizer_file.read(folder))
    (folder / tokenizer_file.NAME).unlink()
    made = read_header(folder)
    assert open_tokens.tokens(made).encode("ab")
    assert of_pack(made).tokenizer_bytes == (folder / tokenizer_file.PLAIN).stat().st_size


def test_a_header_without_end_is_not_read(lie: Callable[..., Path]) -> None:
    with pytest.raises(PackError, match="its header has over 8,388,608 bytes"):
        read_header(lie(made_by="x" * (9 << 20)))


def test_a_header_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    (folder / "additional_chat_templates").mkdir()
    for i in range(40):
        (folder / "additional_chat_templates" / f"{i}.jinja").write_text("x" * (250 << 10))
    with pytest.raises(PackError, match=r"the pack's header would have .* bytes"):
        fetch.pack(str(folder), quiet=True)


def test_numbers_of_a_config_are_held_to_the_same_bounds(tmp_path: Path) -> None:
    from outsize.checkpoint import safetensors

    folder = tiny.write_folder(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e11}))
    with pytest.raises(CheckpointError, match=r"config: norm_eps is 100000000000\.0"):
        recipe(safetensors.load(folder))


def test_many_tables_are_refused_in_no_time(open_tiny: Callable[..., Model]) -> None:
    """Each name was looked for among all others: minutes for a header of eight megabytes."""
    pack = open_tiny("llama", "auto").pack
    first, started = pack.table_of("attn-0"), time.process_time()
    many = [replace(first, name=f"attn-{i}") for i in range(20_000)]
    assert layout.fault(pack.description, [*pack.tables[1:], *many])
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["attn-../../x", "attn-0/../0", "attn-x", "attn-"])
def test_a_tables_name_is_a_files_in_the_pack(name: str, open_tiny: Callable[..., Model]) -> None:
    pack = open_tiny("llama", "auto").pack
    tables = [t if t.name != "final-0" else replace(t, name=name) for t in pack.tables]
    assert "has no place" in layout.fault(pack.description, tables)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "folder", "gone"])
def test_records_that_became_something_else(
    kind: str, open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    """Since the header was checked: a pipe was waited for, for ever."""
    header = open_tiny("llama", "auto").pack.table_of("attn-0")
    if kind == "pipe":
        os.mkfifo(tmp_path / header.file)
    if kind == "folder":
        (tmp_path / header.file).mkdir()
    signal.alarm(5)
    try:
        with pytest.raises(ReadError, match="cannot be opened"):
            Table(tmp_path, header, IOStats())
    finally:
        signal.alarm(0)
