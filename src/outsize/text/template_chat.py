"""One chat template and its messages: each is put into a form that the template can take.

Loaded by `template_child.py` from beside it, in a process that imports nothing of outsize. What a template
can take is tried out: whether it shows calls of tools, their arguments as objects or as texts, and what came
of them. What a template knows nothing of becomes a part of the text, as Hermes' format has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Job = dict[str, Any]
PROBE, RESULT, LAST = "outsize_probe", "outsize_result", "outsize_probe: the last message ends here"
EMPTY: list[Job] = [{"content": ""}, {"content": None}, {}]  # ways of having no text
LONG, SHORT = "call_0123456789abcdef01234567", "call00000"  # ids of calls: ours, and Mistral's
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
ASKED: Job = {"role": "user", "content": "?"}


class Chat:
    """One template, compiled, and what it can take."""

    def __init__(self, template: Any, names: Mapping[str, object]) -> None:
        self.template, self.names = template, names
        self._known: dict[str, bool] = {}

    def render(self, messages: list[Job], unfinished: bool) -> str:
        """The prompt. `unfinished`: it ends with the last message's content, which the reply goes on with."""
        fitting = self._fitting(messages)
        if not unfinished:
            return self._rendered(fitting)
        fitting[-1] = fitting[-1] | {"content": fitting[-1]["content"] + LAST}
        before, found, _ = self._rendered(fitting).rpartition(LAST)
        if not found:
            raise ValueError("it does not render the last message, which is to be continued")
        return before

    def _rendered(self, messages: list[Job]) -> str:
        text: str = self.template.render(messages=messages, **self.names)
        return text

    def _fitting(self, messages: list[Job]) -> list[Job]:
        if any(len(m.get("tool_calls") or []) > 1 for m in messages) and not self._takes("two"):
            messages = one_by_one(messages)
        if any(m.get("role") == "tool" for m in messages) and not self._takes("results"):
            messages = as_user(messages)
        return [self._fit(m) for m in messages]

    def _fit(self, message: Job) -> Job:
        content = message.get("content")
        if isinstance(content, list) and not self._takes("parts"):
            message = message | {"content": "\n".join(part["text"] for part in content)}
        if "tool_call_id" in message and not self._takes("long ids"):
            message = message | {"tool_call_id": short(message["tool_call_id"])}
        if calls := message.get("tool_calls"):
            return self._with_calls(message, [self._call(call) for call in calls])
        message = without(message, "tool_calls")  # some templates ask whether it is there
        return message if message.get("content") is not None else message | {"content": ""}

    def _with_calls(self, message: Job, calls: list[Job]) -> Job:
        """Beside a text, a template may show no calls: then they are what counts."""
        content, bare = message.get("content"), without(message, "content", "tool_calls")
        if content and self._takes("calls beside text"):
            return bare | {"content": content, "tool_calls": calls}
        given = 2 if "content" not in message else 0 if content == "" else 1
        for number in (given, 0, 1, 2):
            if self._takes(f"calls, empty {number}"):
                return bare | EMPTY[number] | {"tool_calls": calls}
        return bare | {"content": "\n".join(filter(None, [content or "", *map(written, calls)]))}

    def _call(self, call: Job) -> Job:
        """Its arguments as the template takes them: most write an object as JSON, some a text as it is."""
        arguments = call["function"].get("arguments")
        with suppress(TypeError, ValueError):
            parsed = json.loads(arguments or "{}")
            arguments = parsed if isinstance(parsed, dict) else arguments
        if isinstance(arguments, dict) and not self._takes("objects"):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call = call | {"function": call["function"] | {"arguments": arguments}}
        if "id" in call and not self._takes("long ids"):
            call["id"] = short(call["id"])
        return call

    def _takes(self, kind: str) -> bool:
        if kind not in self._known:
            self._known[kind] = self._try(kind)
        return self._known[kind]

    def _try(self, kind: str) -> bool:
        try:
            match kind:
                case "parts":
                    text = self._rendered([ASKED | {"content": [{"type": "text", "text": PROBE}]}])
                    return PROBE in text and "'type'" not in text
                case "objects":
                    shown = self._arguments_shown({PROBE: 1})
                    as_object = PROBE in shown and f"'{PROBE}'" not in shown
                    return as_object or PROBE not in self._arguments_shown(PROBE)
                case "two":
                    return self._shows_two()
                case "long ids" | "results":
                    return self._shows_result(LONG if kind == "long ids" else SHORT)
            beside = {"content": PROBE} if kind == "calls beside text" else EMPTY[int(kind[-1])]
            return self._shows_calls(beside)
        except Exception:  # whatever a template does wrong
            return kind == "long ids" and not self._takes("results")

    def _shows_calls(self, text: Job) -> bool:
        """Does the prompt show calls beside this text, and nothing for none? An answer follows them."""
        called = {"role": "assistant", **text, "tool_calls": [self._probe("outsize_call")]}
        shown = self._rendered([ASKED, called])
        self._rendered([ASKED, called, ASKED | {"role": "assistant"}, ASKED])
        return "outsize_call" in shown and shown.count("None") <= self._plain().count("None")

    def _plain(self) -> str:
        """What a prompt says without calls."""
        with suppress(Exception):
            return self._rendered([ASKED, {"role": "assistant", "content": ""}])
        return ""

    def _arguments_shown(self, arguments: object) -> str:
        """The prompts of a call with these arguments, with every way of having no text."""
        shown = ""
        for empty in EMPTY:
            called = {"role": "assistant", "tool_calls": [call_of("f", arguments)], **empty}
            with suppress(Exception):
                shown += self._rendered([ASKED, called])
        return shown

    def _shows_two(self) -> bool:
        """Does it show the second of two calls?"""
        calls = [self._probe("f"), self._probe("outsize_call")]
        return "outsize_call" in self._rendered(
            [ASKED, self._with_calls({"role": "assistant"}, calls)]
        )

    def _shows_result(self, id: str) -> bool:
        """Does it show what came of a call?"""
        said = self._with_calls({"role": "assistant"}, [self._probe("f", id)])
        result: Job = {"role": "tool", "content": RESULT, "tool_call_id": id, "name": "f"}
        return RESULT in self._rendered([ASKED, said, result]).lower()

    def _probe(self, name: str, id: str = SHORT) -> Job:
        return call_of(name, {} if self._takes("objects") else "{}", id)


def one_by_one(messages: list[Job]) -> list[Job]:
    """Several calls of one message as a message each, with its result after it."""
    out, left = list[Job](), list(messages)
    while left:
        message = left.pop(0)
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            out.append(message)
            continue
        results = list[Job]()
        while left and left[0].get("role") == "tool":
            results.append(left.pop(0))
        for number, call in enumerate(calls):
            out.append((message if not number else {"role": "assistant"}) | {"tool_calls": [call]})
            own = [r for r in results if r.get("tool_call_id", call.get("id")) == call.get("id")]
            mine = own if number < len(calls) - 1 else results
            mine = mine[:1] if own and "tool_call_id" not in own[0] and mine is own else mine
            out += mine
            results = [r for r in results if r not in mine]
    return out


def as_user(messages: list[Job]) -> list[Job]:
    """What tools answered, said by the user; several answers are one turn."""
    out, was_result = list[Job](), False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if was_result:
                text = f"{out.pop()['content']}\n{text}"
            message = {"role": "user", "content": text}
        out.append(message)
        was_result = is_result
    return out


def call_of(name: str, arguments: object, id: str = SHORT) -> Job:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


def written(call: Job) -> str:
    """A call as a part of a text."""
    arguments = call["function"].get("arguments")
    arguments = (
        arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
    name = json.dumps(call["function"].get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def short(id: object) -> str:
    """Nine letters and digits that stand for an id: itself, if it is so many."""
    if isinstance(id, str) and len(id) == 9 and id.isascii() and id.isalnum():
        return id
    digest = hashlib.sha256(str(id).encode()).digest()
    return "".join(LETTERS[byte % len(LETTERS)] for byte in digest[:9])


def without(message: Job, *keys: str) -> Job:
    return {key: value for key, value in message.items() if key not in keys}
