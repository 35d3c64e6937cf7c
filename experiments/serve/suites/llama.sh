#!/usr/bin/env bash
# llama.cpp's server tests of the contract of OpenAI and Anthropic, against a server that is not theirs.
. "$(dirname "$0")/common.sh"
cd "$SUITES/llama-tests"
export DEBUG_EXTERNAL=1 PORT
bounded "$SUITES/venv/llama/bin/python" -m pytest -p no:cacheprovider -q --timeout 120 -m "not slow" "${@:-unit}"
