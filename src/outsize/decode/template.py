"""Chat templates, rendered where they can do no harm: a process of its own with a memory and a time
limit, in jinja2's immutable sandbox. A template is a program that came with a foreign file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from outsize.errors import TemplateError

MAX_TEMPLATE = 256 << 10
MAX_TEXT = 16 << 20
TIME_LIMIT_S = 10
Messages = Sequence[Mapping[str, str]]

# Runs in the child. Reads one JSON object, writes one.
_CHILD = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
except (ImportError, ValueError, OSError):
    pass
from datetime import datetime
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message):
    raise TemplateError(message)
job = json.load(sys.stdin)
env = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
env.filters["tojson"] = lambda v, indent=None: json.dumps(v, ensure_ascii=False, indent=indent)
env.globals["raise_exception"] = refuse
env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
try:
    template = env.from_string(job["template"])
    answer = {"texts": [template.render(messages=m, **job["names"]) for m in job["chats"]]}
except MemoryError:
    answer = {"error": "it used more than 1 GB of memory"}
except Exception as e:
    answer = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
sys.stdout.write(json.dumps(answer))
""".replace("SECONDS", str(TIME_LIMIT_S))


def render(
    template: str, chats: Sequence[Messages], names: Mapping[str, str], answer: bool = True
) -> list[str]:
    """The prompt of each chat, ready for the model's reply. Raises TemplateError."""
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(
            f"the chat template has {len(template):,} characters, at most {MAX_TEMPLATE:,} are "
            "rendered; use --raw to do without it"
        )
    variables = {**names, "add_generation_prompt": answer}
    job = {"template": template, "chats": [list(map(dict, c)) for c in chats], "names": variables}
    reply = _ask(json.dumps(job))
    if "error" in reply:
        raise TemplateError(
            f"the chat template failed: {reply['error']}; use --raw to do without it"
        )
    texts: list[str] = reply["texts"]
    if sum(map(len, texts)) > MAX_TEXT:
        raise TemplateError(f"the chat template made more than {MAX_TEXT:,} characters")
    return texts


def _ask(job: str) -> dict[str, list[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=job, capture_output=True, text=True, timeout=TIME_LIMIT_S, encoding="utf-8",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template ran longer than {TIME_LIMIT_S} s") from None
    if done.returncode:
        raise TemplateError(f"the chat template's process ended with status {done.returncode}")
    reply: dict[str, list[str]] = json.loads(done.stdout)
    return reply
