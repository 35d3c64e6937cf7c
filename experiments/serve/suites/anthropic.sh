#!/usr/bin/env bash
# anthropic-sdk-python's own tests of messages, count_tokens and models.
. "$(dirname "$0")/common.sh"
cd "$SUITES/anthropic-sdk-python"
TEST_API_BASE_URL=$URL PYTHONPATH=$here bounded "$SUITES/venv/anthropic/bin/python" -m pytest -p no:cacheprovider -p refused_fields -o addopts="" -q -rx \
    tests/api_resources/test_messages.py tests/api_resources/test_models.py -k "not batch" "$@"
