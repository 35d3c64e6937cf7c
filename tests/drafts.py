"""Mask drafters and LoRA adapters of tiny models, with random numbers in them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from outsize.adapt import checkpoints
from outsize.adapt.mtp.losses import MtpRecipe, new_parameters
from outsize.engine.model import Model
from outsize.model.lora import widths
from outsize.model_config import Description

PEFT = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def random_parameters(model: Model, recipe: MtpRecipe) -> dict[str, torch.Tensor]:
    """As training begins, but with additions and a sampler that do something."""
    d = model.pack.description
    made = new_parameters(d, recipe, torch.randn(d.vocab_size, d.width))
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    for name, value in made.items():
        if name.endswith(".B") or name.startswith("sampler.second"):
            value.normal_(0, 0.1, generator=generator)
    return made


def write_masks(model: Model, path: Path, recipe: MtpRecipe | None = None, **about: object) -> Path:
    """A mask drafter for a model."""
    recipe = recipe or MtpRecipe(k=3, rank=4)
    base = {"kind": "masks", "base": model.pack.source.sha256, "rows": "adjacent", "scale": 2.0}
    checkpoints.save(path, random_parameters(model, recipe), base | about)
    return path


def write_peft(
    model: Model, folder: Path, seed: int, rank: int = 4, parts: tuple[str, ...] = tuple(PEFT)
) -> Path:
    """A LoRA adapter as PEFT saves it."""
    return write_lora(model.pack.description, folder, seed, rank, parts)


def write_lora(
    d: Description, folder: Path, seed: int, rank: int, parts: tuple[str, ...] = tuple(PEFT)
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(d.num_layers):
        for part in parts:
            rows, width = widths(d)[part]
            stem = f"base_model.model.model.layers.{layer}.{PEFT[part]}"
            a = torch.randn(rank, width, generator=generator) / width**0.5
            b = torch.randn(rows, rank, generator=generator) * 0.2
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
