#!/usr/bin/env bash
# Makes a folder with copies of the suites at the versions named below, and a virtual environment for each.
# usage: prepare.sh FOLDER      (git, python3 >= 3.11, and node for Open Responses; 1.6 GB)
set -eu
mkdir -p "${1:?usage: $0 FOLDER}" && cd "$1"
at() { # REPOSITORY COMMIT
    local name=${1##*/}
    [ -d "$name" ] || git clone --quiet "https://github.com/$1" "$name"
    git -C "$name" checkout --quiet "$2"
}
at openai/openai-python e43b4224
at anthropics/anthropic-sdk-python 009b0353
at ollama/ollama-python 25b9329
at openresponses/openresponses 92c12d9
if [ ! -d llama-tests ]; then # llama.cpp's server tests are in this source distribution
    python3 -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: llama-cpp-python==0.3.36 -d archives
    tar xzf archives/llama_cpp_python-0.3.36.tar.gz --strip-components=6 --one-top-level=llama-tests \
        llama_cpp_python-0.3.36/vendor/llama.cpp/tools/server/tests
fi
environment() { # NAME PACKAGES
    [ -d "venv/$1" ] || python3 -m venv "venv/$1"
    "venv/$1/bin/pip" install --quiet "${@:2}"
}
sdk="pytest pytest-asyncio respx rich time-machine inline-snapshot dirty-equals httpx-aiohttp griffe nest_asyncio"
environment openai $sdk -e ./openai-python
environment anthropic $sdk http-snapshot -e ./anthropic-sdk-python
environment llama pytest pytest-timeout filelock requests openai wget numpy aiohttp prometheus-client
environment langchain langchain-tests langchain-openai langchain-ollama langchain-anthropic pytest-asyncio pytest-timeout
environment llm llm llm-ollama
environment ollama rich tqdm -e ./ollama-python
environment schemathesis schemathesis
environment lmeval "lm-eval[api]" # 760 MB
mkdir -p openresponses-run/bin && cd openresponses-run # without its web pages' dependencies
cp ../openresponses/bin/compliance-test.ts bin/
mkdir -p src && cp -r ../openresponses/src/lib ../openresponses/src/generated src/
echo '{"private": true, "type": "module", "dependencies": {"zod": "^3.25.76", "tsx": "^4"}}' >package.json
npm install --silent
