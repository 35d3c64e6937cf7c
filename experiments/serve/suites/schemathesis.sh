#!/usr/bin/env bash
# Random requests made from /openapi.json: no answer is a 5xx, and each is as the description says.
. "$(dirname "$0")/common.sh"
bounded "$SUITES/venv/schemathesis/bin/st" run "$URL/openapi.json" --url "$URL" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    -n "${EXAMPLES:-300}" --workers 4 --seed 1 "$@"
