"""Makes compressed_tensors.safetensors: matrices that the library compressed, their configs, and what it
gives back for them. Needs `pip install compressed-tensors` (0.20.0 made what is here):
`python -m tests.checkpoint.make_compressed_tensors`. Scales of halves are widened before the library
multiplies, so that its numbers are those of fp32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-not-found]
from compressed_tensors.compressors.format import (  # type: ignore[import-not-found]
    infer_module_format,
)
from compressed_tensors.quantization import (  # type: ignore[import-not-found]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.quant_scheme import (  # type: ignore[import-not-found]
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (  # type: ignore[import-not-found]
    calculate_qparams,
)
from safetensors.torch import save_file

FILE = Path(__file__).with_name("compressed_tensors.safetensors")
ROWS, WIDTH = 16, 64
PRESETS = ("FP8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16")
ARGS = {
    "int4": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4-zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int4-row": {"num_bits": 4, "strategy": "channel"},
    "int8-packed": {"num_bits": 8, "strategy": "group", "group_size": 64},
    "int8-zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
}


def spans(w: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of all that share a scale."""
    if args.strategy == "tensor":
        return w.min().reshape(1), w.max().reshape(1)
    groups = w.unflatten(1, (-1, args.group_size or WIDTH))
    return groups.amin(2), groups.amax(2)


def compress(scheme: QuantizationScheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the library stores, its own numbers, and the config as bytes of JSON."""
    torch.manual_seed(23)
    w, args = (torch.randn(ROWS, WIDTH) * 0.02).to(dtype), scheme.weights
    form = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form.value)
    whole = (
        (448 * 6 / w.abs().max()).reshape(1).float() if args.strategy == "tensor_group" else None
    )
    scale, zero = calculate_qparams(*spans(w, args), args, global_scale=whole)
    state = {"weight": w, "weight_scale": scale}
    state |= {} if args.symmetric else {"weight_zero_point": zero}
    state |= {} if whole is None else {"weight_global_scale": whole}
    stored = dict(compressor.compress(state, scheme))
    halves = stored["weight_scale"].dtype in (torch.float16, torch.bfloat16)
    wide = stored | ({"weight_scale": stored["weight_scale"].float()} if halves else {})
    numbers = compressor.decompress(wide, scheme)["weight"]
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form.value, ignore=["lm_head"],
        quantization_status="compressed",
    )  # fmt: skip
    text = json.dumps(config.model_dump(mode="json")).encode()
    return stored | {"numbers": numbers, "config": torch.tensor(list(text), dtype=torch.uint8)}


def main() -> None:
    schemes = {name: preset_name_to_scheme(name, ["Linear"]) for name in PRESETS}
    for name, args in ARGS.items():
        schemes[name] = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    schemes["W8A8"] = preset_name_to_scheme("W8A8", ["Linear"])
    made = {}
    for i, (name, scheme) in enumerate(schemes.items()):
        stored = compress(scheme, (torch.float16, torch.bfloat16)[i % 2])
        made |= {f"{name}.{k}": t.contiguous().clone() for k, t in stored.items()}
    save_file(made, FILE)


if __name__ == "__main__":
    main()
