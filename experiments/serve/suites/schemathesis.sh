#!/usr/bin/env bash
# Random requests made from /openapi.json: no answer is a 5xx, and each is as the description says. Left out are the
# paths of Ollama's that change which models there are: their answer is 501, in words. Start the server with a small
# --context (64): a reply without max_tokens is as long as that allows.
. "$(dirname "$0")/common.sh"
bounded "$SUITES/venv/schemathesis/bin/st" run "$URL/openapi.json" --url "$URL" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --exclude-path-regex '^/api/(blobs|copy|create|delete|push)' --request-timeout 120 \
    -n "${EXAMPLES:-300}" --workers 4 --seed 1 "$@"
