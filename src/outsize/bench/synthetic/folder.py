"""Writes a model with random weights as a folder of safetensors in bf16, a file a layer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outsize.bench.synthetic.shapes import Size, recipe, tensors, values


def write_folder(folder: Path, family: str, size: Size, seed: int) -> int:
    """The safetensors folder, a file a layer; its bytes."""
    folder.mkdir(parents=True)
    made, generator = recipe(family, size, "safetensors"), torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    mapping: dict[str, str] = {}
    for name, shape, _ in tensors(made):
        number = next((part for part in name.split(".") if part.isdigit()), "top")
        mapping[name] = f"model-{number}.safetensors"
        weights = torch.randn(shape, generator=generator)
        weights = weights / math.sqrt(shape[-1]) if len(shape) == 2 else 1 + 0.05 * weights
        shards.setdefault(mapping[name], {})[name] = weights.bfloat16()
        done = [f for f in shards if f != mapping[name] and "top" not in f]
        for file in done:
            save_file(shards.pop(file), folder / file, {"format": "pt"})
    for file, content in shards.items():
        save_file(content, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": mapping})
    )
    _folder_config(folder, family, size)
    return sum(f.stat().st_size for f in folder.iterdir())


def _folder_config(folder: Path, family: str, size: Size) -> None:
    config = values(size, family) | {
        "model_type": family, "vocab_size": size.vocab, **({} if family == "opt" else {"hidden_act": "silu"}),
        "tie_word_embeddings": False, "eos_token_id": size.vocab - 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    config |= {"norm_topk_prob": True} if size.experts else {}
    config["architectures"] = [f"{family.capitalize()}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<|{i}|>" for i in range(size.vocab - len(alphabet))]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
