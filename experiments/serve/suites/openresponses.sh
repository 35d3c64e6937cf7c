#!/usr/bin/env bash
# The compliance test of Open Responses: every event and answer against its schema. Left out: seven tests over WebSocket, two
# of a compaction endpoint, and images.
. "$(dirname "$0")/common.sh"
cd "$SUITES/openresponses-run"
over_http=basic-response,assistant-phase,response-output-phase-schema,streaming-response,system-prompt,tool-calling
bounded npx tsx bin/compliance-test.ts -u "$URL/v1" -k none -m "$MODEL" --filter "$over_http,multi-turn" "$@"
