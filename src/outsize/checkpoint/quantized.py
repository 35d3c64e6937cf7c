"""Quantized safetensors, named for what they are: their matrices are not the tensors of the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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


def quantization_of(config: Mapping[str, object]) -> str:
    """How a config.json says that its weights are quantized; "" for not at all, or in a way that is read."""
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, Mapping) else [config]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            value = part.get(key)
            if isinstance(value, Mapping) and value:
                return _name(key, value)
    return ""


def _name(key: str, value: Mapping[str, object]) -> str:
    method = str(value.get("quant_method", "")).lower()
    if method in READ:
        return ""
    four, eight = (value.get(f"load_in_{n}bit", value.get(f"_load_in_{n}bit")) for n in (4, 8))
    if method == "bitsandbytes" or (not method and (four or eight)):
        return f"bitsandbytes ({4 if four else 8} bits)" if four or eight else "bitsandbytes"
    if not method and key == "quantization":
        return f"MLX ({value.get('bits', '?')} bits)"
    if not method and {four, eight} <= {False}:
        return ""
    name = NAMES.get(method, method[:40] or ("compressed-tensors" if key[0] == "c" else key))
    inner = value.get("quant_algo", value.get("format", value.get("bits", value.get("w_bit"))))
    if inner is None:
        return name
    return f"{name} ({inner} bits)" if isinstance(inner, int) else f"{name} ({str(inner)[:40]})"


def refuse_quantized(config: Mapping[str, object], folder: Path) -> None:
    """Raises UnsupportedError for a folder whose weights are in a quantization that is not read."""
    name = quantization_of(config)
    if not name and "quantization_config" not in config:
        name = next((n for file, n in QUANTIZED.items() if (folder / file).is_file()), "")
    if name:
        raise UnsupportedError(
            f"{folder}: the weights are quantized with {name}, which outsize does not read; use the original "
            "checkpoint (F32, F16 or BF16) or a GGUF of it, such as Q4_K_M or Q8_0"
        )
