"""Ollama's own client against a running server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import httpx
import ollama
import pytest

from outsize.engine.model import Model
from outsize.serve import host as hosts
from tests.serve.conftest import Running, Serving

HI = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "num_predict": 5}


@pytest.fixture
def llama(served: Running) -> Iterator[Any]:
    with ollama.Client(served.url, trust_env=False) as made:
        yield made


def test_chat(llama: Any) -> None:
    answer = llama.chat("other", messages=HI, options=GREEDY)
    assert (answer.model, answer.message.role, answer.done) == ("other", "assistant", True)
    assert answer.message.content
    assert (answer.done_reason, answer.eval_count) == ("length", 5)
    datetime.fromisoformat(answer.created_at)
    durations = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
    assert all(duration > 0 for duration in durations)
    assert abs(answer.total_duration - sum(durations)) < 5


@pytest.mark.parametrize("kind", ["chat", "generate"])
def test_a_stream_brings_the_same(llama: Any, kind: str) -> None:
    more = {"messages": HI} if kind == "chat" else {"prompt": "hello"}
    whole = getattr(llama, kind)("other", options=GREEDY, **more)
    chunks = list(getattr(llama, kind)("other", options=GREEDY, stream=True, **more))
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]

    def text(of: Any) -> str:
        said: str = of.message.content if kind == "chat" else of.response
        return said

    assert "".join(text(chunk) for chunk in chunks) == text(whole) != ""
    last = chunks[-1]
    assert (last.done_reason, last.eval_count) == (whole.done_reason, whole.eval_count)
    assert last.prompt_eval_count == whole.prompt_eval_count
    assert len({chunk.created_at for chunk in chunks}) == 1
    if kind == "generate":
        assert last.context == whole.context
        assert len(whole.context) > whole.prompt_eval_count


def test_the_asynchronous_client(served: Running, llama: Any) -> None:
    async def both() -> tuple[str, str]:
        async with ollama.AsyncClient(served.url, trust_env=False) as made:
            whole = await made.chat("other", messages=HI, options=GREEDY)
            stream = await made.chat("other", messages=HI, options=GREEDY, stream=True)
            return whole.message.content or "", "".join(
                [c.message.content or "" async for c in stream]
            )

    whole, streamed = asyncio.run(both())
    assert whole == streamed == llama.chat("other", messages=HI, options=GREEDY).message.content


def test_lines_have_no_blank_ones(client: httpx.Client) -> None:
    body = {"model": "other", "messages": HI, "options": GREEDY}
    with client.stream("POST", "/api/chat", json=body) as stream:
        assert stream.headers["content-type"] == "application/x-ndjson"
        text = stream.read().decode()
    assert text.endswith("\n")
    assert all(json.loads(line)["model"] == "other" for line in text.removesuffix("\n").split("\n"))


def test_generate_goes_on(llama: Any) -> None:
    first = llama.generate("other", "hello", options=GREEDY)
    second = llama.generate("other", "more", options=GREEDY, context=first.context)
    alone = llama.generate("other", "more", options=GREEDY)
    assert second.prompt_eval_count == len(first.context) + alone.prompt_eval_count
    assert second.context[: len(first.context)] == first.context


def test_a_raw_prompt(llama: Any) -> None:
    raw = llama.generate("other", "hello", raw=True, options=GREEDY)
    templated = llama.generate("other", "hello", options=GREEDY)
    assert raw.prompt_eval_count < templated.prompt_eval_count
    assert raw.context is None


def test_a_system_message(llama: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    chat = llama.chat("other", messages=messages, options=GREEDY)
    generate = llama.generate("other", "hello", system="Be brief.", options=GREEDY)
    assert chat.message.content == generate.response


def test_names(llama: Any) -> None:
    assert llama.chat("other:latest", messages=HI, options=GREEDY).message.content


def test_models(llama: Any, served: Running) -> None:
    models = llama.list().models
    assert [model.model for model in models] == served.host.names()
    for model in models:
        assert model.size > 0
        assert len(model.digest) == 64
        assert (model.details.format, model.details.family) == ("outsize", "llama")
        assert model.details.parameter_size.endswith("K")
        assert model.details.quantization_level
        assert model.modified_at.tzinfo is not None
    (loaded,) = llama.ps().models
    assert (loaded.size_vram, loaded.context_length) == (0, 512)
    assert loaded.expires_at > datetime.now(loaded.expires_at.tzinfo)
    assert (loaded.name, loaded.digest) == (served.host.name, models[0].digest)


def test_show(llama: Any) -> None:
    shown = llama.show("other")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 512
    assert shown.modelinfo["general.parameter_count"] > 10_000
    assert shown.template
    assert shown.modified_at
    with pytest.raises(ollama.ResponseError, match="not known") as caught:
        llama.show("nobody")
    assert caught.value.status_code == 404


def test_pull_of_a_model_that_is_here(llama: Any) -> None:
    assert llama.pull("other").status == "success"
    assert [part.status for part in llama.pull("other", stream=True)] == ["success"]
    with pytest.raises(ollama.ResponseError, match="not known"):
        llama.pull("nobody")


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.create("new", from_="other"),
        lambda c: c.copy("other", "new"),
        lambda c: c.delete("other"),
        lambda c: c.push("other"),
        lambda c: c.create_blob(__file__),
    ],
)
def test_what_changes_models_is_refused(ask: Callable[[Any], Any], served: Running) -> None:
    with (
        ollama.Client(served.url, trust_env=False) as made,
        pytest.raises(ollama.ResponseError, match="outsize serve MODEL") as caught,
    ):
        ask(made)
    assert caught.value.status_code == 501


@pytest.mark.parametrize(
    "ask", [lambda c: c.embed("other", "x"), lambda c: c.embeddings("other", "x")]
)
def test_embeddings_are_refused(ask: Callable[[Any], Any], served: Running) -> None:
    with (
        ollama.Client(served.url, trust_env=False) as made,
        pytest.raises(ollama.ResponseError, match="no embeddings") as caught,
    ):
        ask(made)
    assert caught.value.status_code == 400


def test_a_sign_of_life(client: httpx.Client) -> None:
    json_only = {"accept": "application/json"}
    assert client.get("/", headers=json_only).text == "Ollama is running"
    assert client.head("/", headers=json_only).status_code == 200
    browser = client.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert "Ollama" not in browser.text


def test_version(client: httpx.Client) -> None:
    told = client.get("/api/version").json()
    assert [int(part) for part in told["version"].split(".")] >= [0, 6, 4], "clients look for this"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "nobody"}, 404, "known are"),
        ({"options": {"num_ctx": 513}}, 400, "513.*512"),
        ({"options": {"mirostat": 2}}, 400, "mirostat"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "tokens.*512"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(llama: Any, fields: dict[str, Any], status: int, words: str, stream: bool) -> None:
    with pytest.raises(ollama.ResponseError, match=words) as caught:
        list(llama.chat(**{"model": "other", "messages": HI, "stream": stream, **fields}))
    assert caught.value.status_code == status


def test_an_error_is_one_text(client: httpx.Client) -> None:
    answer = client.post("/api/chat", json={"model": "nobody", "messages": HI})
    assert list(answer.json()) == ["error"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("kind", ["chat", "generate"])
def test_logprobs(llama: Any, kind: str) -> None:
    more = {"messages": HI} if kind == "chat" else {"prompt": "hello"}
    more |= {"options": {**GREEDY, "num_predict": 40}, "format": {"const": "abc \u2713"}}
    more |= {"logprobs": True, "top_logprobs": 2}
    whole = getattr(llama, kind)("other", **more)
    parts = list(getattr(llama, kind)("other", stream=True, **more))
    text = whole.message.content if kind == "chat" else whole.response
    told = list(whole.logprobs)
    assert [len(token.top_logprobs) for token in told] == [2] * len(told)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in told)
    assert [token for part in parts for token in part.logprobs or []] == told
    assert text == '"abc \u2713"'
    assert "".join(token.token for token in told).startswith('"abc ')


def test_options_of_a_machine_are_named(client: httpx.Client) -> None:
    options = {**GREEDY, "num_gpu": 0, "num_thread": 4}
    body = {"model": "other", "messages": HI, "options": options, "stream": False, "think": False}
    answer = client.post("/api/chat", json={**body, "keep_alive": "5m"})
    assert answer.status_code == 200
    ignored = answer.headers["x-outsize-ignored"]
    assert ignored == "options.num_gpu,options.num_thread,keep_alive,think"


def test_load_and_unload(serve: Serving) -> None:
    running = serve(alias=("other",)).until_ready()
    with ollama.Client(running.url, trust_env=False) as made:
        assert made.chat("other", messages=[], keep_alive=0).done_reason == "unload"
        assert made.ps().models == []
        assert made.list().models[0].model == running.host.name
        assert made.generate("other", "", keep_alive="5m").done_reason == "load"
        assert len(made.ps().models) == 1
        assert [part.done_reason for part in made.generate("other", "", stream=True)] == ["load"]


def test_lists_do_not_load_a_model(serve: Serving) -> None:
    running = serve(alias=("other",)).until_ready()
    with ollama.Client(running.url, trust_env=False) as made:
        known = made.list().models
        made.generate("other", "", keep_alive=0)
        assert made.list().models == known, "what is known of it stays"
        assert made.ps().models == []
        assert running.host.running is None


def test_unloading_lets_others_end(
    serve: Serving, endless: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's `ollama stop` is not the end of another's reply."""
    monkeypatch.setattr(hosts, "UNLOAD_S", 0.05)
    running = serve(endless, alias=("other",)).until_ready()
    options = {"num_predict": -1, "temperature": 0}  # greedy, the tiny model never ends
    body = {"model": "other", "prompt": "hi", "options": options, "raw": True}
    with running.client() as client, ollama.Client(running.url, trust_env=False) as made:
        with client.stream("POST", "/api/generate", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            assert made.generate("other", "", keep_alive=0).done_reason == "unload"
            assert "error" not in json.loads(next(lines))
            assert running.host.running is not None
        running.until(lambda: running.host.running is None, "it is closed once nobody asks")
        assert made.generate("other", "").done_reason == "load"
