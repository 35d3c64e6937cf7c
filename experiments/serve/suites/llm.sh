#!/usr/bin/env bash
# The `llm` program: plain, stream, schema, tool, over OpenAI's chat and responses and over Ollama's dialect.
. "$(dirname "$0")/common.sh"
export LLM_USER_PATH=$(mktemp -d) OLLAMA_HOST=$URL OPENAI_API_KEY=none
trap 'rm -r "$LLM_USER_PATH"' EXIT
llm="$SUITES/venv/llm/bin/llm"
passed=0 failed=0
try() { # NAME PATTERN COMMAND...
    local out
    if out=$(LIMIT=300 bounded "${@:3}" 2>&1 </dev/null) && grep -qE "$2" <<<"$out"; then
        passed=$((passed + 1)); echo "ok      $1"
    else
        failed=$((failed + 1)); echo "FAILED  $1"; sed 's/^/        /' <<<"$out" | tail -20
    fi
}
# The call is made, and its result taken. A small model may call again and again, until `llm` ends that.
try_tool() { # NAME COMMAND...
    local whole='out=$("$@" 2>&1) && ended=0 || { grep -q "Chain limit" <<<"$out"; ended=$?; }; echo "$out"; exit $ended'
    try "$1" 'Tool call: llm_time' bash -c "$whole" - "${@:2}" -T llm_time --td -o temperature 0 "What time is it?"
}
at="openai endpoint $URL/v1 -m $MODEL -o max_tokens 60"
try "plain" . $llm $at "Say hello"
try "no stream" . $llm $at --no-stream "Say hello"
try "system" . $llm $at -s "You are brief" "Say hello"
try "schema" '^\{"name": ?".*", ?"age": ?-?[0-9]+' $llm $at --schema 'name, age int' "Invent a dog"
try_tool "tool" $llm openai endpoint $URL/v1 -m $MODEL -o max_tokens 200
try "responses" . $llm openai endpoint $URL/v1 -m $MODEL --responses "Say hello"
try "responses, schema" '^\{"name": ?".*", ?"age": ?-?[0-9]+' $llm openai endpoint $URL/v1 -m $MODEL --responses --schema 'name, age int' "Invent a dog"
try_tool "responses, tool" $llm openai endpoint $URL/v1 -m $MODEL --responses -o max_tokens 200
try "ollama models" . $llm ollama models
name=ollama/$($llm ollama models | awk 'NR==2 {print $1}')
try "ollama plain" . $llm -m "$name" -o num_predict 60 "Say hello"
try "ollama schema" '"age": ?-?[0-9]+' $llm -m "$name" -o num_predict 60 --schema 'name, age int' "Invent a dog"
try_tool "ollama tool" $llm -m "$name" -o num_predict 200
echo "$passed passed, $failed failed"
[ $failed = 0 ]
