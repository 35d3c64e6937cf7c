#!/usr/bin/env bash
# ollama-python's examples, each as a program.
. "$(dirname "$0")/common.sh"
cd "$SUITES/ollama-python/examples"
export OLLAMA_HOST=$HOST
out="web-search web-search-mcp web-search-gpt-oss web_search_gpt_oss_helper" # ollama.com's own service, with a key
out+=" generate-image multimodal-chat multimodal-generate structured-outputs-image" # images
out+=" chat-with-history" # a keyboard
out+=" thinking thinking-generate" # a model that thinks: they print that
out+=" gpt-oss-tools gpt-oss-tools-stream" # a model that stops calling tools: until it does, they ask again
refuses="create embed fill-in-middle" # must fail: the server says in words what it does not have
passed=0 failed=0 refused=0 skipped=0
for file in *.py; do
    name=${file%.py}
    if [[ " $out " == *" $name "* ]]; then skipped=$((skipped + 1)); continue; fi
    text=$(LIMIT=${EACH:-300} bounded "$SUITES/venv/ollama/bin/python" "$file" 2>&1 </dev/null) && ended=ok || ended=FAILED
    if [[ " $refuses " == *" $name "* ]]; then
        grep -qE 'ResponseError: .+ \(status code: (400|501)\)' <<<"$text" && ended=refused || ended=FAILED
    fi
    case $ended in
    ok) passed=$((passed + 1)) ;;
    refused) refused=$((refused + 1)) ;;
    *) failed=$((failed + 1)) ;;
    esac
    printf '%-8s%s\n' $ended "$name"
    [ $ended = ok ] || sed 's/^/        /' <<<"$text" | tail -1
done
echo "$passed passed, $failed failed, $refused refused, $skipped left out"
[ $failed = 0 ]
