"""The kernels compiled for processors that this machine's may not be: aarch64 (ARM laptops, phones, servers)
in an emulator, and x86 without AVX-512. They equal their plain twins, and a row's bits are its own. A plain
run compiles fast, `-m slow` with the flags that users get."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from torch import Tensor

import outsize
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.palette import Palette
from outsize.engine.model import Model
from outsize.kernels import build
from outsize.kernels.backend import Product
from outsize.kernels.native import Native
from outsize.kernels.norm import RMSNorm
from outsize.kernels.palettes import FORMS
from outsize.kernels.plain import PLAIN, lowrank_product
from outsize.kernels.structs import LowRankMatrix, NativeMatrix, NativePalette
from outsize.kv.int8 import decode, encode
from outsize.plan import decide
from outsize.storage.native_reader import CANCELLED, FAILED, GOOD, Job
from tests import IS_WORKER
from tests.golden.test_golden import logits
from tests.kernels.aarch64 import SIZE, Emulated, compile_program, missing
from tests.laws.test_native import TOLERANCE, routed_alike
from tests.laws.test_palettes import OWN, ROWS, fields_of, own_levels, stored

P = ctypes.c_void_p
PROGRAMS = {  # compiler, processor, optimization
    "aarch64": ("gcc", "armv8-a", "-O1"),
    "aarch64 as for users": ("gcc", "armv8-a", "-O3"),
    "aarch64, newer": ("gcc", "armv8.2-a+dotprod+fp16", "-O3"),
    "aarch64, clang": ("clang", "armv8.2-a+dotprod+fp16", "-O3"),
}
AVX2 = "x86 with AVX2"
NAMES = [
    pytest.param(name, marks=[] if name == "aarch64" else pytest.mark.slow)
    for name in (*PROGRAMS, AVX2)
]


@pytest.fixture(scope="module", params=NAMES)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Emulated | ctypes.CDLL]:
    """The kernels, which are compiled once a run for all its processes."""
    base, name = tmp_path_factory.getbasetemp(), request.param
    made = (base.parent if IS_WORKER else base) / name.replace(" ", "-") / "kernels"
    made.parent.mkdir(exist_ok=True)
    if lacks := missing_for_avx2() if name == AVX2 else missing(PROGRAMS[name][0]):
        pytest.skip(f"{lacks} not on this machine")
    with filelock.FileLock(made.with_name("lock")):
        if not made.is_file():
            compile_avx2(made) if name == AVX2 else compile_program(*PROGRAMS[name], made)
    if name == AVX2:
        yield ctypes.CDLL(str(made))
        return
    running = Emulated(made, tmp_path_factory.mktemp("memory") / "file")
    yield running
    running.close()


def missing_for_avx2() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    lacks = {
        "a C compiler": build.compiler() is None,
        "AVX2": not {"avx2", "fma", "f16c"} <= set(flags),
    }
    return ", ".join(name for name, is_missing in lacks.items() if is_missing)


def compile_avx2(path: Path) -> None:
    flags = [flag for flag in build.FLAGS if flag != build.OWN_PROCESSOR]
    assert not build._compile(
        str(build.compiler()), (*flags, "-march=x86-64-v3", "-fopenmp-simd"), path
    )


@pytest.fixture(scope="module")
def other(library: Emulated | ctypes.CDLL) -> Native:
    """The backend of another processor."""
    native = Native(library)  # type: ignore[arg-type]
    if not isinstance(library, ctypes.CDLL):
        native.library = None  # type: ignore[assignment]  # its threads cannot read for this process
    return native


def assert_is_product(product: Product, x: Tensor, w_NK: Tensor, tolerance: float) -> None:
    """Of x and w, and each row has the bits that it has alone."""
    want = x.float() @ w_NK.T
    alone = torch.cat([product(row, False) for row in x.split(1)])
    assert (alone.float() - want).norm() <= tolerance * want.norm()
    for rows in {2, 3, 5, len(x)} - {1}:
        assert torch.equal(product(x[:rows], False), alone[:rows])


SOME_FORMS = [
    "q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "tq", "iq2", "iq4_nl",
    "mxfp4", "nvfp4", "uint4-64-bf16", "int4-128-fp32",
]  # fmt: skip


@pytest.mark.parametrize("name", [*SOME_FORMS, *OWN])
def test_palettes(name: str, other: Native) -> None:
    if name in OWN:
        e, fields = own_levels(name, other)
    else:
        e, fields = Palette(name, FORMS[name], other), fields_of(stored(name))
    w_NK = e.decode(fields)
    torch.manual_seed(3)
    product, x = e.product(fields), torch.randn(9, w_NK.shape[1])
    assert_is_product(product, x, w_NK, 0.0005)
    assert_is_product(product, x.bfloat16(), w_NK, 0.004)
    columns = other._some_palettes(NativePalette(e.coded(fields)), 0, ROWS)
    exact = w_NK.bfloat16().float()
    assert ((columns.float() - exact).abs() <= exact.abs() * 2**-7).all()


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_groups(bits: int, other: Native) -> None:
    torch.manual_seed(bits)
    e, x = Group(bits, other), torch.randn(9, 192)
    fields = e.encode(torch.randn(96, 192))
    w_NK = e.decode(fields)
    assert_is_product(e.product(fields), x, w_NK, 0.001)
    assert_is_product(e.product(fields), x.bfloat16(), w_NK, 0.004)
    columns = e.linear(torch.eye(192).bfloat16(), fields, True).T
    assert torch.equal(columns.float(), w_NK.bfloat16().float())


def test_tiles(other: Native) -> None:
    torch.manual_seed(2)
    e, x = Int4(other), torch.randn(9, 96).bfloat16()
    fields = e.encode(torch.randn(128, 96))
    assert_is_product(e.product(fields), x, e.decode(fields), 0.005)
    some = other._some_tiles(NativeMatrix(e.coded(fields)), 64, 128)
    assert torch.equal(some, e.decode(fields)[64:].bfloat16())


def test_rows(other: Native) -> None:
    torch.manual_seed(3)
    h, norm = torch.randn(3, 100), RMSNorm(torch.randn(100), 1e-6, torch.bfloat16)
    close(other.norm(h, norm), PLAIN.norm(h, norm))
    gate_up = torch.randn(3, 200).bfloat16()
    for activation in ("silu", "gelu_tanh"):
        close(other.gate(gate_up, activation), PLAIN.gate(gate_up.clone(), activation))
    for post in (None, norm):
        ours, twin, y = h.clone(), h.clone(), torch.randn(3, 100).bfloat16()
        other.residual(ours, y, post)
        PLAIN.residual(twin, y, post)
        close(ours, twin)


def close(ours: Tensor, twin: Tensor) -> None:
    assert (ours.float() - twin.float()).norm() <= 0.005 * twin.float().norm()


def test_heads(other: Native) -> None:
    x_THK, w_HNK = torch.randn(3, 2, 64).bfloat16(), torch.randn(2, 21, 64).bfloat16()
    ours = other.heads(x_THK, w_HNK)
    close(ours, PLAIN.heads(x_THK, w_HNK).float())
    assert torch.equal(other.heads(x_THK[1:2], w_HNK), ours[1:2])


@pytest.mark.parametrize("coarse", [False, True])
def test_lowrank(coarse: bool, other: Native) -> None:
    torch.manual_seed(4)
    a, b, scale = torch.randn(8, 64).bfloat16(), torch.randn(2, 48, 2).bfloat16(), None
    if coarse:
        a, b, scale = (a * 30).to(torch.int8), (b * 30).to(torch.int8), torch.rand(8) * 1e-3
    m, x, y = (
        LowRankMatrix(a, b, scale, (16, 48)),
        torch.randn(3, 64).bfloat16(),
        torch.randn(3, 48),
    )
    ours, y = y.bfloat16(), y.bfloat16()
    other.lowrank(m, x, ours, slice(0, 3), False)
    close(ours, y.float() + lowrank_product(m, x))
    for t in range(3):
        single = y[t : t + 1].clone()
        other.lowrank(m, x[t : t + 1], single, slice(0, 1), False)
        assert torch.equal(single, ours[t : t + 1])


@pytest.mark.parametrize("width", [24, 64])
def test_entries_in_8_bits(width: int, other: Native) -> None:
    coded = encode(torch.randn(4, 9, width).bfloat16())
    ours, twin = torch.zeros(2, 4, 12, width, dtype=torch.bfloat16)
    other.decode_entries(coded, ours, 9)
    decode(coded, twin, 9)
    assert torch.equal(ours, twin)


def test_checksums(library: Emulated | ctypes.CDLL) -> None:
    function = library["checksum"]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_uint32
    content = torch.arange(1000).to(torch.uint8)
    assert function(content.data_ptr(), 1000) == zlib.crc32(content.numpy())


def test_reading_threads(library: Emulated | ctypes.CDLL) -> None:
    """They read the program's memory, which is a file."""
    if isinstance(library, ctypes.CDLL):
        pytest.skip("they are those of this machine: tests/storage/test_reads.py")
    function, size, at = library["read_jobs"], 100_000, SIZE - 200_000
    function.argtypes, function.restype = (
        [ctypes.c_long, P, ctypes.c_long, ctypes.c_long, P],
        ctypes.c_long,
    )
    content = torch.randint(0, 256, (size,)).to(torch.uint8)
    library.memory[at : at + size] = content.numpy().tobytes()
    crc, file, out = (
        zlib.crc32(content.numpy()),
        library.file.fileno(),
        torch.zeros(6, size, dtype=torch.uint8),
    )
    jobs = (Job * 6)(*(
        Job(out=out[i].data_ptr(), size=size, offset=offset, piece=30_000, left=4, fd=file, check=1, crc=c)
        for i, (offset, c) in enumerate([(at, crc)] * 2 + [(at, crc ^ 1), (SIZE - 1, crc)] + [(at, crc)] * 2)
    ))  # fmt: skip
    states = torch.zeros(6, dtype=torch.int32)
    cancelled = function(2, jobs, 6, ctypes.sizeof(Job), states.data_ptr())
    last = CANCELLED if cancelled else GOOD
    assert states.tolist() == [GOOD, GOOD, FAILED, FAILED, last, GOOD]
    for i in (0, 1, 5):
        assert torch.equal(out[i], content)


@pytest.mark.parametrize(
    ("family", "encoding", "kv"),
    [("gemma3", "int8", "int8"), ("gpt_oss", "int4", "auto"), ("olmoe", "q4_0", "auto")],
)
def test_a_model(
    family: str,
    encoding: str,
    kv: str,
    other: Native,
    folder_of: Callable[[str], Path],
    open_tiny: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention with windows and sinks, mixtures of experts, keys and values in 8 bits: all of a step."""
    plain = open_tiny(family, encoding, False)
    assert plain.transformer.backend is PLAIN
    monkeypatch.setattr(plain.transformer, "kv", kv)
    monkeypatch.setattr(decide, "find", lambda *_: other)
    with outsize.load(str(folder_of(family)), encoding=encoding, kv=kv, quiet=True) as model:
        assert model.transformer.backend is other
        with routed_alike(plain, model):
            twin, ours = logits(plain, [7, 1, 1, 1]), logits(model, [7, 1, 1, 1])
        assert np.linalg.norm(ours - twin) <= TOLERANCE * np.linalg.norm(twin)
        assert np.array_equal(logits(model, [7, 1, 1, 1]), logits(model, [3, 7]))
