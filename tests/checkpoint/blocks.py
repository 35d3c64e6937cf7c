"""Blocks of every GGUF type, random, and what the gguf package makes of them; a small model of all types."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray

from outsize.checkpoint import ggml
from outsize.checkpoint.coded import Bytes, Floats
from tests.golden import tiny

READABLE = [k for k in ggml.TYPES.values() if k.is_readable]
FP16_AT = {  # the bytes where a block has fp16 numbers; IQ1_M's lies in four pieces
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
EDGES = (0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7E00)  # 0, subnormal, least, most, inf, NaN
NUM_BLOCKS = 4096
WIDTH, LAYERS, HEADS = 256, 4, 4  # of the small model


def random_blocks(kind: ggml.BlockType) -> Bytes:
    """(4096, size): random bytes; as fp16 numbers, every sign, exponent and higher half of the fraction, and
    EDGES of both signs together with each other."""
    random = np.random.default_rng(3)
    out = random.integers(0, 256, (NUM_BLOCKS, kind.size), dtype=np.uint8)
    edges = np.array([*EDGES, *(e | 0x8000 for e in EDGES)])
    for at in FP16_AT.get(kind.name, []):
        scale = np.arange(NUM_BLOCKS) * 16 + random.integers(0, 16, NUM_BLOCKS)
        random.shuffle(scale)
        scale[:256] = np.tile(edges, 16) if at % 4 else np.repeat(edges, 16)
        _put_scales(out, at, scale)
    if kind.name == "IQ1_M":
        _put_quarters(out[:256], np.repeat(edges, 16))
    return out


def sane_blocks(kind: ggml.BlockType, count: int, random: np.random.Generator) -> Bytes:
    """(count, size): random bytes, whose numbers are finite and small."""
    out = random.integers(0, 256, (count, kind.size), dtype=np.uint8)
    scale = random.uniform(2**-10, 2**-9, count).astype(np.float16).view(np.uint16)
    for at in FP16_AT.get(kind.name, []):
        _put_scales(out, at, scale)
    if kind.name == "IQ1_M":
        _put_quarters(out, scale)
    elif kind.name == "MXFP4":
        out[:, 0] = random.integers(115, 120, count)
    elif kind.name == "NVFP4":
        out[:, :4] = random.integers(0, 32, (count, 4))
    elif kind.name in ("F32", "BF16"):
        numbers = random.normal(0, 0.05, (count, 1)).astype(np.float32)
        out = numbers.view(np.uint8)[:, 4 - kind.size :]
    return np.ascontiguousarray(out)


def _put_scales(blocks: Bytes, at: int, scale: NDArray[np.integer]) -> None:
    blocks[:, at : at + 2] = scale.astype("<u2")[:, None].view(np.uint8)


def _put_quarters(blocks: Bytes, scale: NDArray[np.integer]) -> None:
    """The scales of IQ1_M: four bits in each of the last numbers of 16."""
    for i in range(4):
        quarter = (scale >> (4 * i) & 15).astype(np.uint8)
        blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | quarter << 4


def of_gguf(name: str, rows: Bytes) -> Floats:
    """(N, bytes) -> (N, K): the gguf package's numbers of a type."""
    floats = {"F32": np.float32, "F16": np.float16}.get(name)
    with np.errstate(all="ignore"):
        found: Floats = quants.dequantize(rows if floats is None else rows.view(floats), Kind[name])
    return found


def assert_same(mine: Floats, theirs: Floats) -> None:
    """The same bits; of NaN the places, for the sign of one depends on the order of a sum."""
    nan = np.isnan(theirs)
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype == np.float32
    assert np.array_equal(np.isnan(mine), nan)
    assert np.array_equal(mine.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


def matrices() -> dict[str, tuple[ggml.BlockType, Bytes]]:
    """The weights of a llama: each type at least once, as rows of bytes."""
    random, out = np.random.default_rng(5), {}
    of_layer = dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), WIDTH)
    of_layer |= dict.fromkeys(("attn_k", "attn_v"), WIDTH // 2)
    rows = {f"blk.{i}.{k}.weight": n for i in range(LAYERS) for k, n in of_layer.items()}
    rows |= {"token_embd.weight": tiny.VOCAB, "output.weight": tiny.VOCAB}
    assert len(rows) >= len(READABLE)
    for i, (name, count) in enumerate(rows.items()):
        kind = READABLE[i % len(READABLE)]
        blocks = sane_blocks(kind, count * WIDTH // kind.length, random)
        out[name] = kind, blocks.reshape(count, -1)
    return out


def write_model(path: Path, weights: dict[str, tuple[ggml.BlockType, Bytes]]) -> Path:
    """A llama of such weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([name for name, _ in vocab[:-1]] + ["Ġa"])
    writer.add_token_types([1] * 256 + [3] * (tiny.VOCAB - 257) + [1])
    writer.add_token_merges(["Ġ a"])
    norms = [f"blk.{i}.{k}_norm.weight" for i in range(LAYERS) for k in ("attn", "ffn")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    for name, (kind, rows) in weights.items():
        floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        writer.add_tensor(
            name, rows if floats is None else rows.view(floats), raw_dtype=Kind[kind.name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
