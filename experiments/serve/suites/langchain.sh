#!/usr/bin/env bash
# LangChain's standard integration tests with its clients of three dialects.
. "$(dirname "$0")/common.sh"
export URL MODEL
cd "$here"
bounded "$SUITES/venv/langchain/bin/python" -m pytest -p no:cacheprovider -q -o asyncio_mode=auto --timeout 300 \
    -o asyncio_default_test_loop_scope=session -c /dev/null --rootdir . langchain_chat.py "$@"
