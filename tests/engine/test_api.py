"""The Python surface: replies, conversations, scores, several prompts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.errors import ContextError, OptionError, TemplateError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.pack import fetch
from tests.golden import tiny


@pytest.fixture
def model(open_tiny: Callable[..., Model]) -> Model:
    return open_tiny("llama", "fp32")


def test_stream_is_generate(model: Model) -> None:
    streaming = model.stream("hello", max_tokens=12)
    pieces = list(streaming)
    (reply,) = model.generate("hello", max_tokens=12)
    assert "".join(pieces) == streaming.reply.text == reply.text == str(reply)
    assert reply.prompt_tokens == len(
        model.tokens.encode("<s>user: hello\n<s>assistant: ", special=True)
    )
    assert (reply.new_tokens, reply.finish) == (12, "length")
    assert reply.first_token_s > 0
    assert reply.tokens_per_s > 0
    assert reply.options["max_tokens"] == 12


def test_chat_is_the_template(model: Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = "<s>user: hello\n<s>assistant: "
    (raw,) = model.generate(prompt, raw=True, special=True, max_tokens=9)
    assert model.chat(messages, max_tokens=9).text == raw.text
    with_system = model.chat(messages, max_tokens=9, system="be kind")
    assert with_system.prompt_tokens > raw.prompt_tokens


def test_seeds(model: Model) -> None:
    how = {"temperature": 1.0, "max_tokens": 20, "raw": True, "top_k": 0, "min_p": 0.0}
    texts = [model.generate("abc", seed=s, **how)[0].text for s in (1, 1, 2)]  # type: ignore[arg-type]
    assert texts[0] == texts[1] != texts[2]
    free = model.generate("abc", **how)[0]  # type: ignore[arg-type]
    seed = free.options["seed"]
    assert isinstance(seed, int)
    assert model.generate("abc", seed=seed, **how)[0].text == free.text  # type: ignore[arg-type]


def test_stop_strings_end_the_run(model: Model) -> None:
    (whole,) = model.generate("abc", raw=True, max_tokens=30)
    stop = whole.text[5:7]
    (cut,) = model.generate("abc", raw=True, max_tokens=30, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.new_tokens < 30


def test_score_is_the_forward_pass(model: Model) -> None:
    score = model.score("the sea is wide")
    assert len(score.logprobs) == len(score.tokens) - 1
    span = Span(0, score.tokens, len(score.tokens))
    (out,) = full(model.transformer, [span], [model.transformer.new_kv()])
    exact = torch.log_softmax(out.logits_KV, 1)[:-1].gather(
        1, torch.tensor(score.tokens[1:])[:, None]
    )
    assert score.logprobs == pytest.approx(exact[:, 0].tolist(), abs=1e-5)
    assert math.isfinite(sum(score.logprobs))


def test_a_conversation_remembers_and_does_not_compute_again(model: Model) -> None:
    talk = model.conversation(max_tokens=6)
    first = "".join(talk.say("one"))
    assert talk.reply.text == first
    second = "".join(talk.say("two"))
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    fresh = model.chat(messages, max_tokens=6)
    assert second == fresh.text  # fp32: the cached and the fresh keys agree far below a token
    assert talk.messages == [*messages, {"role": "assistant", "content": second}]
    talk.reset("be brief")
    assert talk.messages == []
    assert "".join(talk.say("one"))


def test_cancel_keeps_what_was_said(model: Model) -> None:
    streaming = model.stream("abc", raw=True, max_tokens=50)
    pieces = []
    for piece in streaming:
        pieces.append(piece)
        streaming.cancel()
    assert streaming.reply.finish == "cancelled"
    assert streaming.reply.text == "".join(pieces)
    assert 1 <= streaming.reply.new_tokens <= 3


def test_context(folder_of: Callable[[str], object]) -> None:
    with outsize.load(str(folder_of("llama")), context=16, quiet=True) as model:
        (reply,) = model.generate("a" * 10, raw=True, max_tokens=50)
        assert (reply.new_tokens, reply.finish) == (6, "length")
        with pytest.raises(ContextError, match=r"the text has 17 tokens, the context holds 16"):
            model.generate("a" * 16, raw=True)
        with pytest.raises(ContextError, match="has 20 tokens"):
            model.score("a" * 20)
    with pytest.raises(ContextError, match="from 2 to 512"):
        outsize.load(str(folder_of("llama")), context=513, quiet=True)


def test_a_batch_whose_members_end_at_different_steps(folder_of: Callable[[str], object]) -> None:
    """Each ends when its context is full, often in the middle of a character."""
    with outsize.load(str(folder_of("llama")), context=40, quiet=True) as model:
        prompts = ["q" * (3 * i + 2) for i in range(10)]
        together = model.generate(prompts, raw=True, max_tokens=60)
        assert len({r.new_tokens for r in together}) > 3
        for prompt, reply in zip(prompts, together, strict=True):
            assert reply.text == model.generate(prompt, raw=True, max_tokens=60)[0].text


def test_bad_requests(model: Model, folder_of: Callable[[str], object]) -> None:
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        model.generate("x", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="the prompt is empty"):
        model.generate("", raw=True)
    with pytest.raises(OptionError, match="a message needs a 'role'"):
        model.chat([{"text": "x"}])
    with pytest.raises(OptionError, match="raw takes prompts that are strings"):
        model.chat([{"role": "user", "content": "x"}], raw=True)
    with pytest.raises(OptionError, match="system prompt needs a chat template"):
        model.generate("x", raw=True, system="s")
    with pytest.raises(OptionError, match="threads is 0"):
        outsize.load(str(folder_of("llama")), threads=0)
    with pytest.raises(OptionError, match="encoding 'int3' is not known"):
        fetch.pack(str(folder_of("llama")), encoding="int3")


def test_base_models_say_that_they_cannot_chat(tmp_path: object) -> None:
    from pathlib import Path

    folder = tiny.write_folder(Path(str(tmp_path)) / "base", "qwen2")
    (folder / "chat_template.jinja").unlink()
    with outsize.load(str(folder), quiet=True) as model:
        assert model.generate("abc", max_tokens=3)[0].new_tokens == 3
        with pytest.raises(TemplateError, match="is a base model"):
            model.chat([{"role": "user", "content": "x"}])
