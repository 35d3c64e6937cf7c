"""Malformed requests: what a server must refuse by a status of 4xx, at once, and survive.

`cases` are those that were thought of, as the bytes to send; `mutants` are sound requests with one field made
wrong, without end. The rules of what is wrong are OpenAI's, Anthropic's and Ollama's.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from outsize.bench.serve.bodies import BODIES, CHAT, COMPLETIONS, body_of
from outsize.bench.serve.client import Address

DEEP, DIGITS, LARGE, MANY, LONG = 50_000, 5_000, 1 << 20, 1_000_000, 1_200_000
SOUND = "pattern bomb", "schema that is a loop"
PATHS = tuple(BODIES)
HUGE = 10**4000  # Python writes no number of more than 4,300 digits


class Case(NamedTuple):
    """One request."""

    name: str
    data: bytes
    may_close: bool = False  # no HTTP at all: closing the connection is an answer, too
    is_sound: bool = False  # as it is: it may be done


def cases(address: Address, model: str) -> Iterator[Case]:
    """Each once."""
    yield from _texts(address, model)
    yield from _fields(address, model)
    yield from _encodings(address, model)
    yield from _raw(address, model)


def _body(model: str, changes: dict[str, Any] | None = None, path: str = CHAT) -> dict[str, Any]:
    common = {"model": model, "max_tokens": 1, "temperature": 0.0, "stream": False}
    return body_of(path, "hello", common) | (changes or {})


def _texts(address: Address, model: str) -> Iterator[Case]:
    """Bodies that are no JSON, or JSON that no one should accept."""
    sound = json.dumps(_body(model))
    texts = {
        "empty": "", "not JSON": "{", "a list": "[]", "a number": "1", "null": "null", "a string": '"x"',
        "deep lists": "[" * DEEP, "deep objects": '{"a":' * DEEP,
        "closed deep lists": "[" * DEEP + "]" * DEEP,
        "deep in a field": sound[:-1] + ',"tools":' + "[" * DEEP + "]" * DEEP + "}",
        "many digits": sound.replace('"max_tokens": 1', '"max_tokens": ' + "9" * DIGITS),
        "not a number": sound.replace('"temperature": 0.0', '"temperature": NaN'),
        "infinity": sound.replace('"temperature": 0.0', '"temperature": Infinity'),
        "minus infinity": sound.replace('"temperature": 0.0', '"temperature": -1e999'),
        "lone surrogate": sound.replace("hello", "\\ud800"),
        "lone surrogate in a name": sound[:-1] + ',"\\udfff": 1}',
        "surrogates the wrong way": sound.replace("hello", "\\udc00\\ud800"),
        "a name twice": sound[:-1] + ',"max_tokens": 2}',
        "a comment": "// x\n" + sound, "two objects": sound * 2, "single quotes": sound.replace('"', "'"),
        "a control character": sound.replace("hello", "a\x01b"), "a comma at the end": sound[:-1] + ",}",
        "many messages": '{"model":"m","messages":[' + '{"role":"user","content":"a"},' * MANY + "]}",
        "large": sound[:-1] + ',"user":"' + "a" * (LARGE * 12) + '"}',
    }  # fmt: skip
    for path in (CHAT, COMPLETIONS, "/v1/messages", "/api/chat"):
        for name, text in texts.items():
            if len(text) < LARGE or path == CHAT:
                yield Case(f"{path}: {name}", address.request(path, text.encode()))


def _fields(address: Address, model: str) -> Iterator[Case]:
    """Sound JSON that asks for too much."""
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}
    wide = {"type": "string", "pattern": "(a{1,9999}){1,9999}"}
    far = {"$ref": "http://127.0.0.1:1/schema.json"}
    of_schema = {"schema bomb": _powers(24), "schema that is a loop": loop, "pattern bomb": wide,
                 "schema elsewhere": far, "schema of no kind": {"type": "hiccup"}, "schema of a number": 123,
                 "schema of a reference to nothing": {"$ref": "#/$defs/none"},
                 "schema that nothing meets": {"allOf": [{"type": "string"}, {"type": "number"}]},
                 "large schema": {"enum": [f"{i:08}" for i in range(200_000)]}}  # fmt: skip
    for name, schema in of_schema.items():
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        data = address.request(CHAT, _body(model, {"response_format": form}))
        yield Case(name, data, is_sound=name in SOUND)
    changed: dict[str, dict[str, Any]] = {
        "stop of a megabyte": {"stop": "a" * LARGE}, "many stops": {"stop": [str(i) for i in range(99)]},
        "many tools": {"tools": [_tool(f"t{i}") for i in range(9_999)]},
        "two tools of a name": {"tools": [_tool("a")] * 2}, "another model": {"model": "no such"},
        "a tool that is not there": {"tools": [_tool("a")], "tool_choice": _tool("b")},
        "line ends in the model's name": {"model": "a\r\nX-Evil: 1\r\n\r\n"},
        "a path as model": {"model": "../../etc/passwd"}, "an image": {"messages": [_image()]},
        "long": {"messages": [{"role": "user", "content": "river " * LONG}]},
        "fields that do not exist": {f"field{i}": i for i in range(999)},
    }  # fmt: skip
    for name, changes in changed.items():
        yield Case(name, address.request(CHAT, _body(model, changes)))


def _powers(depth: int) -> dict[str, Any]:
    """A schema that is small as text, and doubles with each reference."""
    names = [f"a{i}" for i in range(depth)]
    pairs = pairwise(names)
    inner = {a: {"type": "object", "properties": {k: {"$ref": f"#/$defs/{b}"} for k in "xyz"},
                 "required": ["x", "y", "z"]} for a, b in pairs}  # fmt: skip
    return {"$ref": f"#/$defs/{names[0]}", "$defs": inner | {names[-1]: {"type": "hiccup"}}}


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def _image() -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    return {"role": "user", "content": [part]}


def _encodings(address: Address, model: str) -> Iterator[Case]:
    """Bodies that are not what their headers say."""
    sound = json.dumps(_body(model)).encode()
    bomb = gzip.compress(b" " * (LARGE * 64))
    told = {
        "a gzip bomb": (bomb, {"Content-Encoding": "gzip"}),
        "gzip": (gzip.compress(sound), {"Content-Encoding": "gzip"}),
        "zstd": (b"\x28\xb5\x2f\xfd\x04\x00" + sound, {"Content-Encoding": "zstd"}),
        "text": (sound, {"Content-Type": "text/plain"}), "no kind": (sound, {"Content-Type": ""}),
        "a form": (b"a=1", {"Content-Type": "application/x-www-form-urlencoded"}),
        "not UTF-8": (sound.replace(b"hello", b"\xff\xfe\xc0\x80"), {}),
        "UTF-16": (sound.decode().encode("utf-16"), {}), "zeros": (b"\0" * 99, {}),
        "another host": (sound, {"Host": "evil.example"}),
        "a host with a path": (sound, {"Host": "127.0.0.1/evil"}),
    }  # fmt: skip
    for name, (data, headers) in told.items():
        yield Case(name, address.request(CHAT, data, headers=headers))
    for path in (
        "/no/such/path",
        "/%00",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "/page/../../app.py",
    ):
        yield Case(path, address.request(path, b"", "GET"))
    for method in ("DELETE", "PUT", "TRACE", "PATCH", "BREW"):
        yield Case(f"{method} {CHAT}", address.request(CHAT, b"", method))


def _raw(address: Address, model: str) -> Iterator[Case]:
    """What is no sound HTTP."""
    host = f"Host: {address.host}:{address.port}\r\n"
    post = f"POST {CHAT} HTTP/1.1\r\n{host}Content-Type: application/json\r\nConnection: close\r\n"
    sound = json.dumps(_body(model))
    told = {
        "noise": "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", "no version": f"GET /\r\n{host}\r\n",
        "another version": f"GET / HTTP/9.9\r\n{host}\r\n", "no host": "GET /v1/models HTTP/1.1\r\n\r\n",
        "two hosts": f"GET /v1/models HTTP/1.1\r\n{host}Host: evil.example\r\n\r\n",
        "long line": f"GET /{'a' * (1 << 18)} HTTP/1.1\r\n{host}\r\n",
        "long header": f"GET / HTTP/1.1\r\n{host}X: {'a' * (1 << 18)}\r\n\r\n",
        "many headers": f"GET / HTTP/1.1\r\n{host}" + "".join(f"X{i}: 1\r\n" for i in range(20_000)) + "\r\n",
        "negative length": f"{post}Content-Length: -1\r\n\r\n",
        "no number": f"{post}Content-Length: ten\r\n\r\n",
        "two lengths": f"{post}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}",
        "length and chunks": f"{post}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
        "an unknown coding": f"{post}Transfer-Encoding: evil\r\n\r\n{sound}",
        "chunks of no size": f"{post}Transfer-Encoding: chunked\r\n\r\nZZ\r\n{sound}\r\n0\r\n\r\n",
        "chunks too many": f"{post}Transfer-Encoding: chunked\r\n\r\n" + f"10000\r\n{' ' * 65536}\r\n" * 160,
        "a huge length": f"{post}Content-Length: {1 << 40}\r\n\r\n{sound}",
        "a header of two lines": f"{post}X: a\r\n b\r\nX y: c\r\n\r\n",
        "a null": f"GET /\0 HTTP/1.1\r\n{host}\r\n",
    }  # fmt: skip
    for name, text in told.items():
        yield Case(f"raw: {name}", text.encode("latin-1"), True)


NUMBERS: list[Any] = ["x", [], {}, True, -1e9, 1e300, HUGE]
WHOLE = [*NUMBERS, 1.5, -7]
LISTS: list[Any] = [1, "x", {}, [1], [[]], [None], [{}], True]
# By field: values that are wrong for it in OpenAI's chat.
WRONG: dict[str, list[Any]] = {
    "model": [1, [], {}, True, "\0", "no such model"], "messages": [*LISTS, [], [{"role": "user"}],
        [{"role": 1, "content": "a"}], [{"role": "nobody", "content": "a"}], [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "tool", "content": {}}],
        [{"role": "user", "content": [{"type": "hiccup"}]}], [{"content": "a"}]],
    "max_tokens": [*WHOLE, 0], "max_completion_tokens": [*WHOLE, 0], "temperature": NUMBERS, "top_p": NUMBERS,
    "min_p": NUMBERS, "top_k": WHOLE, "presence_penalty": NUMBERS, "frequency_penalty": NUMBERS,
    "seed": ["x", [], {}, 1.5, HUGE], "n": [*WHOLE, 0, 17, 999], "stop": [1, {}, [1], [""], [[]]],
    "stream": [1, "x", [], {}], "stream_options": [1, "x", [], {"include_usage": 1}, {"hiccup": 1}],
    "logprobs": [1, "x", [], {}], "top_logprobs": [*WHOLE, 21], "tools": [*LISTS, [{"type": "hiccup"}],
        [{"type": "function"}], [{"type": "function", "function": {"name": ""}}]],
    "tool_choice": [1, [], "hiccup", {"type": "hiccup"}, "required"],
    "response_format": [1, "x", [], {}, {"type": "hiccup"}, {"type": "json_schema"},
        {"type": "json_schema", "json_schema": 1}],
    "logit_bias": [1, "x", [1], {"x": 1}, {"1": "x"}, {"1": 101}, {str(1 << 40): 1}, {"-1": 1}],
    "modalities": [["audio"], 1], "functions": [[{"name": "a"}], 1],
    "prediction": [{"type": "content", "content": "a"}], "audio": [{"voice": "a"}], "hiccup": [1, "x", []],
}  # fmt: skip


def mutants(address: Address, model: str, draw: random.Random) -> Iterator[Case]:
    """Chat requests with one field made wrong."""
    while True:
        name = draw.choice(list(WRONG))
        value = draw.choice(WRONG[name])
        yield Case(
            f"{name} = {repr(value)[:40]}", address.request(CHAT, _body(model, {name: value}))
        )


def damaged(address: Address, model: str, draw: random.Random) -> Iterator[Case]:
    """Sound requests to any endpoint with a few bytes changed. One may still be sound."""
    while True:
        path = draw.choice(PATHS)
        data = bytearray(json.dumps(_body(model, None, path)).encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.choice(b'{}[]",:\\0\x00\xff9eE-truenull')
        yield Case(f"{path}: damaged", address.request(path, bytes(data)))
