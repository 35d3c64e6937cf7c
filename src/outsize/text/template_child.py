"""The process in which chat templates are rendered: a template is a program that came with a foreign file.

Started by `outsize.text.template` as a script, it reads one JSON object a line and writes one. It has a
memory limit, a time limit for each job, jinja2's immutable sandbox, and nothing of the parent's; it ends when
its input does, or after a minute without work. Templates may call what `transformers` lets them call.
"""

from __future__ import annotations

import json
import select
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

MEMORY, IDLE_S = 1 << 30, 60
WIDEST = 6  # characters of JSON for one of a text
Job = dict[str, Any]


def limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass


def limit_time(seconds: int) -> None:
    """Seconds of processor time from now on; past them the system ends the process."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, ValueError, OSError):
        pass


def environment() -> Any:
    """jinja2 as `transformers` sets it up for chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model says; to render, it is nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

        def _say(self, caller: Callable[[], str]) -> str:
            return caller()

    class Refusal(TemplateError):
        """What a template says by raise_exception."""

    def refuse(message: str) -> None:
        raise Refusal(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def chat_kind() -> Any:
    """The class of `template_chat.py`, which lies beside this script."""
    import importlib.util

    file = Path(__file__).with_name("template_chat.py")
    spec = importlib.util.spec_from_file_location("template_chat", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.Chat


def answer(env: Any, chats: Any, job: Job) -> Job:
    """Render each chat of a job; `chats` makes a Chat of a template. Never raises."""
    try:
        chat = chats(env.from_string(job["template"]), job["names"])
        texts: list[str] = []
        for messages in job["chats"]:
            texts.append(chat.render(messages, job.get("unfinished", False)))
            if sum(map(len, texts)) > job["most"]:
                return {"error": f"it made more than {job['most']:,} characters"}
        return {"texts": texts}
    except MemoryError:
        return {"error": "it used more than 1 GB of memory"}
    except Exception as e:
        if type(e).__name__ == "Refusal":
            return {"refusal": str(e)[:300]}
        return {"error": f"{type(e).__name__}: {str(e)[:300]}"}


def main() -> None:
    """Serve jobs until there are no more."""
    sys.path[:] = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
    try:
        env, chats = environment(), chat_kind()
    except ImportError as e:
        sys.stdout.write(json.dumps({"error": f"{e}; install jinja2 for this Python"}) + "\n")
        return
    limit_memory()
    while select.select([sys.stdin], [], [], IDLE_S)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        job = json.loads(line)
        limit_time(job["seconds"])
        reply = json.dumps(answer(env, chats, job))
        if len(reply) >= WIDEST * job["most"]:
            reply = json.dumps({"error": f"it made more than {job['most']:,} characters"})
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
