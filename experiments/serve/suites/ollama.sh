#!/usr/bin/env bash
# ollama-python's examples, each as a program. Left out: those that want ollama.com's web search or a key, an image model, a keyboard.
. "$(dirname "$0")/common.sh"
cd "$SUITES/ollama-python/examples"
export OLLAMA_HOST=$HOST
out="chat-with-history web-search web-search-mcp web-search-gpt-oss web_search_gpt_oss_helper generate-image multimodal-chat multimodal-generate structured-outputs-image"
passed=0 failed=0 skipped=0
for file in *.py; do
    name=${file%.py}
    if [[ " $out " == *" $name "* ]]; then skipped=$((skipped + 1)); continue; fi
    if text=$(LIMIT=${EACH:-300} bounded "$SUITES/venv/ollama/bin/python" "$file" 2>&1 </dev/null); then
        passed=$((passed + 1)); echo "ok      $name"
    else
        failed=$((failed + 1)); echo "FAILED  $name"; sed 's/^/        /' <<<"$text" | tail -3
    fi
done
echo "$passed passed, $failed failed, $skipped left out"
