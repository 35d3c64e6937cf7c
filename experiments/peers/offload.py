"""Time transformers with accelerate's offload to disk:
`python -m experiments.peers.offload FOLDER --cap BYTES`.

pip install transformers accelerate. The process may keep `--cap` bytes less `--runtime`, the rest of the
weights is read from disk at each pass. Greedy, batch 1, cold. One JSON object last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--cap", type=int, required=True)
    p.add_argument("--runtime", type=int, default=900_000_000, help="kept for all but weights")
    p.add_argument("--prompt-tokens", type=int, default=512)
    p.add_argument("--new-tokens", type=int, default=4)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            a.model, dtype=torch.bfloat16, device_map="auto",
            max_memory={"cpu": max(1 << 20, a.cap - a.runtime)}, offload_folder=folder,
        )  # fmt: skip
        vocab = model.config.vocab_size
        made = [(i * i * 7919 + 13 * i + 5) % (vocab - 300) for i in range(a.prompt_tokens)]
        ids = torch.tensor([made])
        with torch.inference_mode():
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            prefill_s = time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(a.new_tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            decode_s = time.perf_counter() - started
    print(json.dumps({
        "engine": "transformers + accelerate, disk offload",
        "prefill_tokens_per_s": round(a.prompt_tokens / prefill_s, 3),
        "decode_tokens_per_s": round(a.new_tokens / decode_s, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
