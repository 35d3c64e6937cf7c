#!/usr/bin/env bash
# openai-python's own tests of chat, completions, models and responses: strict and loose, sync, async and aiohttp.
. "$(dirname "$0")/common.sh"
cd "$SUITES/openai-python"
TEST_API_BASE_URL=$URL/v1 PYTHONPATH=$here bounded "$SUITES/venv/openai/bin/python" -m pytest -p no:cacheprovider -p refused_fields -o addopts="" -q -rx \
    tests/api_resources/chat/test_completions.py tests/api_resources/test_completions.py \
    tests/api_resources/test_models.py tests/api_resources/test_responses.py \
    -k "create and not input_tokens or models and not delete" "$@"
