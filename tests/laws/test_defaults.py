"""torch's default type and device are the user's to set: answers do not depend on them, nor do packs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outsize.kernels.find import native_in
from outsize.kernels.layouts import CodedMatrix
from outsize.kernels.structs import NativeMatrix, address
from tests.golden.test_golden import write_gguf

ROOT = Path(__file__).parents[2]
# A heap that was written over shows at any time: a process of its own must end well.
SCRIPT = """
import contextlib, sys
import torch, outsize
from outsize.pack import fetch as library
from outsize.engine import load as loading
from outsize.pack.outline import of_pack
from outsize.plan import place
from outsize.system import memory as budget

taken = loading.runtime_bytes()
loading.runtime_bytes = lambda *_: taken
PROMPT = "The quick brown fox jumps over the lazy dog, " * 2
WHAT = "float16", "float64", "bfloat16", "meta"


@contextlib.contextmanager
def default(what):
    before = torch.get_default_dtype()
    try:
        if what != "meta":
            torch.set_default_dtype(getattr(torch, what))
        with torch.device("meta") if what == "meta" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def answer(model):
    drawn = model.generate([PROMPT, "a"], raw=True, max_tokens=6, seed=1, repeat_penalty=1.2, temperature=1.0)
    plain = model.generate(PROMPT, raw=True, max_tokens=12, temperature=0)
    return [r.text for r in (*drawn, *plain)], model.score("abcd").logprobs


def opened(source, **how):
    return outsize.load(source, quiet=True, **how)


for source in sys.argv[1:]:
    for how, some in (({}, WHAT), ({"native": False}, WHAT[2:])):
        with opened(source, **how) as model:
            expected = answer(model)
            for what in some:
                with default(what):
                    assert answer(model) == expected, (source, how, what, "after loading")
        for what in some:
            with default(what), opened(source, **how) as model:
                assert answer(model) == expected, (source, how, what, "before loading")

# Streamed: little is held.
loading.runtime_bytes = lambda *_: 0
budget.resident = lambda *_: 0
place.TOKENIZER_PEAK = place.TOKENIZER_FACTOR = 0
for source in sys.argv[1:]:
    least = place.least_bytes(of_pack(library.pack(source, quiet=True)), 0, 0, 256)
    for what in ("float32", *WHAT[2:]):
        with default(what), opened(source, memory=least, context=256) as model:
            texts = answer(model)
            expected = texts if what == "float32" else expected
            assert texts == expected, (source, what, "streamed")
            assert model.traffic.bytes_read > 0
print("done")
"""


def run(*sources: Path, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, sources)],
        capture_output=True, text=True, cwd=ROOT, timeout=280, env=os.environ | {"OUTSIZE_HOME": str(home)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("families", "kinds"),
    [
        (("llama",), ("Q4_0",)),
        pytest.param((), ("Q8_0",), marks=pytest.mark.slow),
        pytest.param(("gpt_oss", "olmoe"), (), marks=pytest.mark.slow),
    ],
)
def test_answers_do_not_depend_on_defaults(
    families: tuple[str, ...],
    kinds: tuple[str, ...],
    folder_of: Callable[[str], Path],
    home: Path,
    tmp_path: Path,
) -> None:
    """Of models as they are published, and of quantized ones."""
    quantized = [write_gguf(tmp_path / f"{q}.gguf", "llama", quantized=q) for q in kinds]
    run(*map(folder_of, families), *quantized, home=home)


PACKING = """
import os, sys
import torch
from outsize.pack import fetch as library
for encoding in ("int4", "int8", "auto"):
    found = set()
    for what in (None, torch.float16, torch.bfloat16, "meta"):
        torch.set_default_dtype(what if isinstance(what, torch.dtype) else torch.float32)
        torch.set_default_device("meta" if what == "meta" else None)
        os.environ["OUTSIZE_HOME"] = f"{sys.argv[2]}/{what}"
        made = library.pack(sys.argv[1], encoding=encoding, quiet=True)
        found.add(str([t.checksums for t in made.tables]))
    assert len(found) == 1, encoding
print("done")
"""


def test_packs_do_not_depend_on_defaults(
    folder_of: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    native_in(home / "native")
    for what in ("None", "torch.float16", "torch.bfloat16", "meta"):
        shutil.copytree(home / "native", tmp_path / what / "native")
    done = subprocess.run(
        [sys.executable, "-c", PACKING, str(folder_of("qwen3")), str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def test_what_c_would_misread_is_not_handed_over() -> None:
    good = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert address(good, torch.bfloat16) == good.data_ptr()
    for bad in (good.float(), good.half(), good.to("meta"), good.T, good[:, ::2]):
        with pytest.raises(
            TypeError, match=r"a kernel wants a contiguous torch\.bfloat16 on the CPU"
        ):
            address(bad, torch.bfloat16)
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2)
    with pytest.raises(
        TypeError, match=r"torch\.float16 on the CPU, and was handed torch\.float32"
    ):
        NativeMatrix(CodedMatrix(4, 4, 64, codes, None, scale))
