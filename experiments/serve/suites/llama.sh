#!/usr/bin/env bash
# llama.cpp's server tests of what it shares with others: OpenAI's and Anthropic's dialects, tokens, a server's basics.
# llama_plugin.py leaves out single tests, and says why. Its other files test its own endpoints (/completion, /infill,
# /metrics' names, /rerank, slots, sleep, a router's models), embeddings, images, or models of 15 MB to 10 GB.
# One of them wants the model to be called llama-test-model: give the server a link of that name. unit/test_security.py
# wants a server of its own, with --api-key sk-this-is-the-secret-key.
. "$(dirname "$0")/common.sh"
cd "$SUITES/llama-tests"
export DEBUG_EXTERNAL=1 PORT PYTHONPATH=$here
shared="chat_completion compat_anthropic compat_oai_responses tokenize basic tool_call"
[[ "$*" == *unit/* ]] || set -- "$@" $(printf 'unit/test_%s.py ' $shared) unit/test_completion.py::test_completion_{with,stream_with}_openai_library
bounded "$SUITES/venv/llama/bin/python" -m pytest -p no:cacheprovider -p llama_plugin -q -rs --timeout 120 "$@"
