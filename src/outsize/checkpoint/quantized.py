"""How the weights of a folder are quantized: in a way that is read, or named for what it is and refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from outsize.checkpoint.read_json import read_json
from outsize.checkpoint.safetensors_quantized.scheme import (
    AWQ,
    COMPRESSED,
    GPTQ,
    METHODS,
    WAY_OUT,
    Scheme,
    scheme_of,
)  # fmt: skip
from outsize.errors import UnsupportedError

NAMES = {
    "awq": "AWQ", "gptq": "GPTQ", "gptq_marlin": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (FBGEMM)",
    "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "quanto": "Quanto", "torchao": "torchao", "eetq": "EETQ",
    "aqlm": "AQLM", "vptq": "VPTQ", "higgs": "HIGGS", "spqr": "SpQR", "bitnet": "BitNet", "exl2": "EXL2",
    "exl3": "EXL3", "auto-round": "AutoRound", "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt", "modelopt_fp4": "NVFP4 (ModelOpt)", "fp_quant": "FP-Quant", "quark": "Quark",
    "sinq": "SINQ",
}  # fmt: skip
# Files that only quantized checkpoints have, for those whose config.json does not say.
QUANTIZED = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
READ = ("mxfp4",)  # gpt-oss as it is published


# What these hold is read as a config of that method.
OLDER = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}


def quantization(config: Mapping[str, object], folder: Path) -> Scheme | None:
    """How the weights of a folder are quantized; None if they are not, or as gpt-oss is. Raises
    UnsupportedError for a quantization that is not read, naming it."""
    for key, value in _stated(config):
        method = str(value.get("quant_method", "")).lower()
        method = method or (COMPRESSED if key == "compression_config" else "")
        name = _name(key, method, value)
        if method in METHODS:
            return scheme_of(value, method, name, str(folder))
        if name:
            raise _refusal(folder, name)
    if "quantization_config" in config:
        return None
    for file, name in QUANTIZED.items():
        if (folder / file).is_file():
            return _older(folder, file, name)
    return None


def _stated(config: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """What a config says of quantization, if anything, and under which key."""
    nested = config.get("text_config")
    for part in [config, nested] if isinstance(nested, Mapping) else [config]:
        for key in ("quantization_config", "compression_config", "quantization"):
            value = part.get(key)
            if isinstance(value, Mapping) and value:
                yield key, value


def _older(folder: Path, file: str, name: str) -> Scheme:
    """Of a checkpoint whose config.json does not say. Raises UnsupportedError."""
    if file not in OLDER:
        raise _refusal(folder, name)
    values = read_json(folder / file)
    method = str(values.get("quant_method") or OLDER[file]).lower()
    if method not in METHODS:
        raise _refusal(folder, NAMES.get(method, method[:40]))
    return scheme_of(values, method, NAMES[method], str(folder))


def _refusal(folder: Path, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{folder}: the weights are quantized with {name}, which outsize does not read; {WAY_OUT}"
    )


def _name(key: str, method: str, value: Mapping[str, object]) -> str:
    """The quantization in words; "" for none."""
    if method in READ:
        return ""
    four, eight = (value.get(f"load_in_{n}bit", value.get(f"_load_in_{n}bit")) for n in (4, 8))
    if method == "bitsandbytes" or (not method and (four or eight)):
        return f"bitsandbytes ({4 if four else 8} bits)" if four or eight else "bitsandbytes"
    if not method and key == "quantization":
        return f"MLX ({value.get('bits', '?')} bits)"
    if not method and {four, eight} <= {False}:
        return ""
    name = NAMES.get(method, method[:40] or key)
    inner = value.get("quant_algo", value.get("format", value.get("bits", value.get("w_bit"))))
    if inner is None:
        return name
    return f"{name} ({inner} bits)" if isinstance(inner, int) else f"{name} ({str(inner)[:40]})"
