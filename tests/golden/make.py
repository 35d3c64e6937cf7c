"""Make the committed vectors: `python -m tests.golden.make [FAMILY ...]`. Needs transformers.

Each is the fp32 logits of the 40 tokens of tiny.TOKENS, by transformers, from the folder tiny.py writes.
`python -m tests.golden.make shapes FAMILY ...` writes into shapes.json what tensors transformers' checkpoints
of a family have.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

from tests.golden import memory_reference, tiny


def main() -> None:
    names = sys.argv[1:]
    if names[:1] == ["shapes"]:
        for family in names[1:]:
            shapes(family)
        return
    for family in names or tiny.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            model_type = tiny.REFERENCE.get(family, family)
            path = tiny.write_folder(Path(folder), family, model_type)
            if family == "memoryllm":  # transformers has no such class
                made = memory_reference.logits(path, tiny.TOKENS).numpy()
                np.savez_compressed(Path(__file__).with_name(f"{family}.npz"), logits=made)
                continue
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.inference_mode():
                logits = model(torch.tensor([tiny.TOKENS])).logits[0].numpy()
        np.savez_compressed(Path(__file__).with_name(f"{family}.npz"), logits=logits)
        print(family, transformers.__version__, logits.shape, float(np.abs(logits).max()))


def shapes(family: str) -> None:
    """Of the checkpoint that transformers saves of the tiny config."""
    settings, path = tiny.config(family), Path(__file__).with_name("shapes.json")
    kind = tiny.REFERENCE.get(family, settings.pop("model_type"))
    settings.pop("model_type", None)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    known = json.loads(path.read_text()) | {family: dict(sorted(found.items()))}
    lines = (f'  "{name}": {json.dumps(known[name])}' for name in sorted(known))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
