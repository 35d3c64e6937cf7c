#!/usr/bin/env bash
# llama.cpp's server tests of what it shares with others (OpenAI's and Anthropic's dialects, tokens, a server's basics),
# against a server that is not theirs. The other files test its own endpoints and command line. unit/test_security.py
# wants a server with --api-key sk-this-is-the-secret-key.
. "$(dirname "$0")/common.sh"
cd "$SUITES/llama-tests"
export DEBUG_EXTERNAL=1 PORT
shared="chat_completion compat_anthropic compat_oai_responses tokenize basic"
[ $# -gt 0 ] || set -- $(printf 'unit/test_%s.py ' $shared) unit/test_completion.py::test_completion_{with,stream_with}_openai_library
bounded "$SUITES/venv/llama/bin/python" -m pytest -p no:cacheprovider -q --timeout 120 -m "not slow" "$@"
