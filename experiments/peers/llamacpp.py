"""Time llama.cpp on one GGUF: `python -m experiments.peers.llamacpp MODEL.gguf`. One JSON object last.

pip install llama-cpp-python (built for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON). Greedy, batch 1; a
warm-up prefill first, so that neither page faults nor first-use costs are counted against it.
"""

from __future__ import annotations

import argparse
import json
import time

import llama_cpp

TEXT = b"The quick brown fox jumps over the lazy dog while the sea keeps its own slow time. "


def mapped_only() -> None:
    """llama.cpp copies some types into another layout, outside the file's mapping: not then."""
    original = llama_cpp.llama_cpp.llama_model_default_params

    def changed() -> llama_cpp.llama_model_params:
        params = original()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = changed


def last_logits(model: llama_cpp.Llama) -> list[float]:
    """A few of the last token's."""
    found = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
    return [round(found[i], 4) for i in range(64)]


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--prompt-tokens", type=int, default=512)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--cold", action="store_true", help="no warm-up: the first prefill is timed")
    p.add_argument("--no-repack", action="store_true", help="weights stay in the mapped file")
    p.add_argument("--first-id", type=int, help="feed this id, the next, ...; and tell last logits")
    a = p.parse_args()
    if a.no_repack:
        mapped_only()
    model = llama_cpp.Llama(
        a.model, n_ctx=a.prompt_tokens + a.new_tokens + 8, n_threads=a.threads,
        n_threads_batch=a.threads, n_batch=512, verbose=False,
    )  # fmt: skip
    ids = model.tokenize(TEXT * 200)[: a.prompt_tokens]
    fed = iter(range((a.first_id or 0) + a.prompt_tokens, 1 << 30))
    if a.first_id is not None:
        ids = list(range(a.first_id, a.first_id + a.prompt_tokens))
    if not a.cold:
        model.eval(ids)
        model.reset()
    started = time.perf_counter()
    model.eval(ids)
    prefill_s = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(a.new_tokens):
        model.eval([model.sample(temp=0.0) if a.first_id is None else next(fed)])
    decode_s = time.perf_counter() - started
    told = {} if a.first_id is None else {"logits": last_logits(model)}
    print(json.dumps({
        "engine": f"llama-cpp-python {llama_cpp.__version__}", **told,
        "prefill_tokens_per_s": round(len(ids) / prefill_s, 2),
        "decode_tokens_per_s": round(a.new_tokens / decode_s, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
