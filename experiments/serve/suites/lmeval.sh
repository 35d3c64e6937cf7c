#!/usr/bin/env bash
# lm-eval over HTTP: token ids in, log-probabilities out; then the same by the model in a process of its own.
# usage: SUITES=FOLDER SOURCE=MODEL lmeval.sh URL     (SOURCE: what the server was started with; empty: the default model.
# The second half needs outsize in the python on PATH, and as many threads as the server has (OMP_NUM_THREADS): a long
# prompt's products in bf16 are rounded otherwise with one thread than with two, by some .02 nats a token.)
. "$(dirname "$0")/common.sh"
out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -r "$out"' EXIT
cd "$here/lmeval" # the tasks name their files from here
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$out/hf OPENAI_API_KEY=none
bounded "$SUITES/venv/lmeval/bin/lm_eval" --model local-completions --include_path . --tasks outsize_facts,outsize_texts \
    --model_args "model=$MODEL,base_url=$URL/v1/completions,tokenizer_backend=remote,num_concurrent=8,max_length=${CONTEXT:-2048}" \
    --output_path "$out" --log_samples "$@" || exit 1
env -u HF_HUB_OFFLINE python3 ../lmeval_compare.py "${SOURCE:-}" $(find "$out" -name 'samples_*.jsonl')
