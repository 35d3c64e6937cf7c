"""Matrices quantized and stored as published formats define it, in plain loops over torch tensors, and what
they stand for in fp32. Written from the definitions, apart from what reads them.

Shapes: N rows, K inputs, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden import tiny

Stored = dict[str, Tensor]
Quantized = tuple[Stored, Tensor]  # by the last part of their names; fp32 (N, K)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def grouped(w: Tensor, group: int) -> list[Tensor]:
    """(N, group) each; the last may be narrower."""
    return list(w.split(group if group > 0 else w.shape[1], dim=1))


def integers(
    w: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes without sign (N, K), scales (N, G), zero points (N, G), numbers (N, K)."""
    codes, scales, zeros, numbers = [], [], [], []
    top = (1 << bits) - 1
    for g in grouped(w, group):
        low, high = g.amin(1).clamp(max=0), g.amax(1).clamp(min=0)
        if symmetric:
            scale = (torch.maximum(-low, high) / (top // 2)).to(dtype)
            zero = torch.full_like(low, (top + 1) // 2)
        else:
            scale = ((high - low) / top).to(dtype)
            zero = (-low / scale.float()).round().clamp(1, top)
        code = (g / scale.float()[:, None] + zero[:, None]).round().clamp(0, top)
        codes.append(code)
        scales.append(scale)
        zeros.append(zero)
        numbers.append((code - zero[:, None]) * scale.float()[:, None])
    return (
        torch.cat(codes, 1).to(torch.int64), torch.stack(scales, 1),
        torch.stack(zeros, 1).to(torch.int64), torch.cat(numbers, 1),
    )  # fmt: skip


def words(numbers: Tensor, bits: int, dim: int, order: tuple[int, ...] = ()) -> Tensor:
    """Packed along an axis in int32, the lowest bits first."""
    pack = 32 // bits
    n = numbers.movedim(dim, -1)
    n = torch.nn.functional.pad(n, (0, -n.shape[-1] % pack))
    out = torch.zeros(*n.shape[:-1], n.shape[-1] // pack, dtype=torch.int64)
    for i, j in enumerate(order or range(pack)):
        out |= n[..., j::pack] << (bits * i)
    out = torch.where(out >= 1 << 31, out - (1 << 32), out)
    return out.to(torch.int32).movedim(-1, dim).contiguous()


def awq(w: Tensor, group: int = 32, dtype: torch.dtype = torch.float16) -> Quantized:
    code, scale, zero, numbers = integers(w, 4, group, False, dtype)
    stored = {
        "qweight": words(code.T, 4, 1, AWQ_ORDER),
        "qzeros": words(zero.T, 4, 1, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }
    return stored, numbers


def gptq(
    w: Tensor, group: int = 32, symmetric: bool = True, bits: int = 4, v2: bool = False
) -> Quantized:
    code, scale, zero, numbers = integers(w, bits, group, symmetric, torch.float16)
    size = group if group > 0 else w.shape[1]
    stored = {
        "qweight": words(code.T, bits, 0),
        "qzeros": words((zero if v2 else zero - 1).T, bits, 1),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(w.shape[1]) // size).to(torch.int32),
        "bias": torch.zeros(w.shape[0], dtype=torch.float16),  # as AutoGPTQ wrote them for all
    }
    return stored, numbers


def packed(
    w: Tensor, group: int = 32, symmetric: bool = True, bits: int = 4,
    dtype: torch.dtype = torch.float16,
) -> Quantized:  # fmt: skip
    """compressed-tensors, pack-quantized."""
    code, scale, zero, numbers = integers(w, bits, group, symmetric, dtype)
    stored = {
        "weight_packed": words(code, bits, 1), "weight_scale": scale,
        "weight_shape": torch.tensor(w.shape),
    }  # fmt: skip
    if not symmetric:
        stored["weight_zero_point"] = words(zero, bits, 0)
    return stored, numbers


def int8(w: Tensor, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """compressed-tensors, int-quantized: a scale a row."""
    code, scale, zero, numbers = integers(w, 8, -1, symmetric, dtype)
    stored = {"weight": (code - 128).to(torch.int8), "weight_scale": scale}
    if not symmetric:
        stored["weight_zero_point"] = (zero - 128).to(torch.int8)
    return stored, numbers


def fp8(
    w: Tensor, shared: str, name: str = "weight_scale", dtype: torch.dtype = torch.float32
) -> Quantized:
    """A scale for the tensor, a row ("channel") or a block of 128 x 128."""
    rows, width = w.shape
    step = {"tensor": (rows, width), "channel": (1, width), "block": (128, 128)}[shared]
    codes, numbers = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(w.shape)
    scales = torch.empty(-(-rows // step[0]), -(-width // step[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * step[0], (i + 1) * step[0]), slice(j * step[1], (j + 1) * step[1]))
            scale = (w[here].abs().amax() / 448).to(dtype).float()
            scales[i, j] = scale
            codes[here] = (w[here] / scale).to(torch.float8_e4m3fn)
            numbers[here] = codes[here].float() * scale
    scales = scales.to(dtype)
    return {"weight": codes, name: scales.reshape(()) if shared == "tensor" else scales}, numbers


def fp4(w: Tensor, nv: bool = True, divisor: float = 0.0) -> Quantized:
    """compressed-tensors, nvfp4- or mxfp4-pack-quantized."""
    size = 16 if nv else 32
    most = w.abs().amax()
    whole = torch.tensor([divisor or float(448 * 6 / most)]) if nv else torch.ones(1)
    groups = w.reshape(len(w), -1, size)
    scale = groups.abs().amax(2) / 6
    if nv:
        kept = (scale * whole).to(torch.float8_e4m3fn)
        step = kept.float() / whole
    else:
        power = scale.log2().floor().clamp(-127, 127)
        kept, step = (power + 127).to(torch.uint8), 2.0**power
    levels = torch.tensor(FP4)
    code = ((groups / step[:, :, None])[..., None] - levels).abs().argmin(3)
    numbers = (levels[code] * step[:, :, None]).reshape(w.shape)
    flat = code.reshape(w.shape)
    stored = {
        "weight_packed": (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": kept,
    }
    return stored | ({"weight_global_scale": whole} if nv else {}), numbers


def group_of(
    bits: int = 4, group: int | None = 32, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """A kind of weights as a config of compressed-tensors states it."""
    strategy = "channel" if group in (None, -1) else "group"
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False,
        "group_size": None if strategy == "channel" else group, "actorder": None, "block_structure": None,
        "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": ["Linear"], "weights": weights | more, "input_activations": None}


def compressed(form: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quantization_status": "compressed", "global_compression_ratio": 1.9,
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)}, **more,
    }  # fmt: skip


_FLOAT8 = {"type": "float", "group_size": None}
_BLOCK = {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]}
_NV = {"type": "float", "strategy": "tensor_group", "group_size": 16}


@dataclass(frozen=True)
class Format:
    """A way of storing, the config that says so, and the encoding of a pack that holds it exactly ("" for
    none), for matrices of an even number of groups."""

    quantize: Callable[[Tensor], Quantized]
    config: dict[str, Any]
    encoding: str
    more: Stored = field(default_factory=dict)  # beside each matrix


GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}
INVERSE, BFLOAT = "weight_scale_inv", torch.bfloat16
FORMATS: dict[str, Format] = {
    "fp8-blocks": Format(lambda w: fp8(w, "block", INVERSE), BLOCKS, "fp8"),
    "fp8-blocks-bf16": Format(lambda w: fp8(w, "block", INVERSE, BFLOAT), BLOCKS, "fp8"),
    "fp8-tensor": Format(
        lambda w: fp8(w, "tensor"), FP8 | {"activation_scheme": "static"}, "fp8",
        {"input_scale": torch.ones(())}),
    "fbgemm": Format(
        lambda w: fp8(w, "channel"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8"),
    "awq": Format(awq, AWQ, "uint4-32"),
    "awq-bf16": Format(lambda w: awq(w, dtype=BFLOAT), AWQ, "uint4-32-bf16"),
    "awq-64": Format(lambda w: awq(w, 64), AWQ | {"group_size": 64}, "uint4-32"),
    "gptq": Format(gptq, GPTQ, "int4-32"),
    "gptq-row": Format(lambda w: gptq(w, -1), GPTQ | {"group_size": -1, "desc_act": True}, "int4-32"),
    "gptq-zeros": Format(lambda w: gptq(w, symmetric=False), GPTQ | {"sym": False}, "uint4-32"),
    "gptq-v2": Format(
        lambda w: gptq(w, symmetric=False, v2=True), GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        "uint4-32"),
    "gptq-8": Format(lambda w: gptq(w, bits=8), GPTQ | {"bits": 8}, "q8_0"),
    "packed": Format(packed, compressed("pack-quantized", group_of()), "int4-32"),
    "packed-bf16": Format(
        lambda w: packed(w, dtype=BFLOAT), compressed("pack-quantized", group_of()), "int4-32-bf16"),
    "packed-row": Format(
        lambda w: packed(w, -1), compressed("pack-quantized", group_of(group=None)), "int4-32"),
    "packed-zeros": Format(
        lambda w: packed(w, symmetric=False), compressed("pack-quantized", group_of(symmetric=False)),
        "uint4-32"),
    "packed-8": Format(
        lambda w: packed(w, bits=8), compressed("pack-quantized", group_of(8)), "q8_0"),
    "int8": Format(
        int8, compressed("int-quantized", group_of(8, None), kv_cache_scheme={"num_bits": 8}), "int8-32-bf16",
        {"k_scale": torch.ones(1)}),
    "int8-fp16": Format(
        lambda w: int8(w, dtype=torch.float16), compressed("int-quantized", group_of(8, None)), "q8_0"),
    "int8-zeros": Format(
        lambda w: int8(w, False), compressed("int-quantized", group_of(8, None, False)), ""),
    "float-tensor": Format(
        lambda w: fp8(w, "tensor", dtype=BFLOAT),
        compressed("float-quantized", group_of(8, None, **_FLOAT8, strategy="tensor")), "fp8"),
    "float-row": Format(
        lambda w: fp8(w, "channel", dtype=BFLOAT),
        compressed("float-quantized", group_of(8, None, **_FLOAT8)), "fp8"),
    "float-blocks": Format(
        lambda w: fp8(w, "block", dtype=BFLOAT),
        compressed("float-quantized", group_of(8, None, **_BLOCK)), "fp8"),
    "nvfp4": Format(
        lambda w: fp4(w, divisor=64.0), compressed("nvfp4-pack-quantized", group_of(4, None, **_NV)), "nvfp4",
        {"input_global_scale": torch.ones(1)}),
    "mxfp4": Format(
        lambda w: fp4(w, nv=False), compressed("mxfp4-pack-quantized", group_of(type="float")), "mxfp4"),
}  # fmt: skip


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """The maps of a layer; not embeddings, heads, norms, routers, gates of the delta rule."""
    maps = ("_proj.", ".experts.", "in_proj_qkv", "in_proj_z")
    return len(shape) == 2 and any(part in name for part in maps)


def write_folder(folder: Path, family: str, how: Format, as_floats: bool = False) -> Path:
    """A tiny model whose maps are quantized; or the same numbers in fp32."""
    made: Stored = {}
    for name, w in tiny.weights(family).items():
        w = torch.from_numpy(w)
        if not is_quantized(name, tuple(w.shape)):
            made[name] = w
            continue
        stored, numbers = how.quantize(w)
        stem = name.removesuffix(".weight")
        if as_floats:
            made[name] = numbers
        else:
            parts = {
                k: t for k, t in (stored | how.more).items() if k != "bias" or family == "llama"
            }
            made |= {f"{stem}.{k}": t.clone() for k, t in parts.items()}
    tiny.write_folder(folder, family)
    save_file(made, folder / "model.safetensors")
    more = {} if as_floats else {"quantization_config": how.config}
    (folder / "config.json").write_text(json.dumps(tiny.config(family) | more))
    return folder
