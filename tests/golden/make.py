"""Make the committed vectors: `python -m tests.golden.make`. Needs transformers.

Each is the fp32 logits of the 40 tokens of tiny.TOKENS, by transformers, from the folder tiny.py writes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden import tiny


def main() -> None:
    for family in tiny.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            model_type = tiny.REFERENCE.get(family, family)
            path = tiny.write_folder(Path(folder), family, model_type)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.inference_mode():
                logits = model(torch.tensor([tiny.TOKENS])).logits[0].numpy()
        np.savez_compressed(Path(__file__).with_name(f"{family}.npz"), logits=logits)
        print(family, transformers.__version__, logits.shape, float(np.abs(logits).max()))


if __name__ == "__main__":
    main()
