"""Chat templates render as `transformers` renders them, in one process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from outsize.cli.values import parse_arguments
from outsize.errors import OptionError, TemplateError
from outsize.pack.format import Pack
from outsize.text import template as templates
from outsize.text.prompt import _with_reasoning, choose
from outsize.text.template import Worker, pythons, render

USER = {"role": "user", "content": "How much is 1 + 1?"}
CALL = {
    "type": "function",
    "id": "abcdef123",
    "function": {"name": "add", "arguments": {"a": 1, "ü": "<é>"}},
}
TALK: list[Mapping[str, object]] = [
    {"role": "system", "content": " Be short. "},
    USER,
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
    {"role": "user", "content": "Sure?"},
]
TOOLS: list[Mapping[str, object]] = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "abcdef123", "name": "add"},
]
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "ü": "<é>"}}\n</tool_call>'
# As templates are given it that know of no calls.
TOLD: list[Mapping[str, object]] = [USER, {"role": "assistant", "content": WRITTEN}, TOOLS[2]]
SCHEMA = {
    "type": "function",
    "function": {"name": "add", "parameters": {"b": 1, "a": [1, 2.5, None]}},
}
EACH = "{% for m in messages %}"
END = "{% endfor %}"
# The constructs of published templates, each in a small template of our own.
CONSTRUCTS: dict[str, str] = {
    "chatml": EACH + "<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n" + END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bos, trim, loop.first": "{{ bos_token }}" + EACH
    + "{% if loop.first and m.role == 'system' %}<<SYS>>{{ m.content | trim }}<</SYS>>"
    "{% else %}[{{ loop.index0 }}/{{ loop.length }}]{{ m.content }}{% endif %}" + END,
    "eos after answers": EACH + "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    + END,
    "generation": EACH + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n" + END,
    "generation, trimmed": EACH + "{%- generation -%} {{ m.content }} {%- endgeneration -%} " + END,
    "namespace": "{% set ns = namespace(n=0, seen=false) %}" + EACH
    + "{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}{% set ns.seen = true %}{% endif %}" + END
    + "{{ ns.n }}{{ ns.seen }}",
    "macro": "{% macro turn(role, text) %}<{{ role }}>{{ text }}{% endmacro %}"
    + EACH + "{{ turn(m.role, m.content) }}" + END,
    "break and continue": EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}" + END,
    "tools given or not": "{% if tools is not none and tools %}{{ tools | tojson(indent=4) }}{% else %}none"
    "{% endif %}{% if documents is none %}no documents{% endif %}",
    "tojson, plain": "{{ messages | tojson }}",
    "tojson, ascii": "{{ messages | tojson(ensure_ascii=true) }}",
    "tojson, separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ messages | tojson(sort_keys=true, indent=2) }}",
    "tool calls": EACH + "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% elif m.role == 'tool' %}<response>{{ m.content }}</response>{% else %}{{ m.content }}{% "
    "endif %}" + END,
    "defined": "{% if enable_thinking is defined and enable_thinking is false "
    "%}<think>\n\n</think>\n{% endif %}"
    "{{ reasoning_effort | default('medium') }}",
    "reasoning": EACH + "{% if m.reasoning_content is string %}<think>{{ m.reasoning_content "
    "}}</think>{% endif %}"
    "{{ m.content }}" + END,
    "slices and methods": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{{ rest[-1].content.split(' ')[0].strip('?').upper() }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ rest[::-1][0].role.startswith('u') }}",
    "string tests": EACH + "{{ (m.content is string, m.content is mapping, m.content is iterable) }}" + END,
    "dict and range": "{{ dict(a=1) | tojson }}{% for i in range(3) %}{{ i }}{% endfor %}"
    "{{ messages[0] | items | list | length }}{{ {'x': [1]} | tojson }}",
    "whitespace": "{%- for m in messages -%}\n  {{- m.role + '\\n' }}\n  {%- if true %}\n    x\n  "
    "{% endif -%}\n"
    "{%- endfor %}\n\n",
    "raise, not reached": "{% if messages | length > 99 %}{{ raise_exception('too long') }}{% endif %}ok",
    "parts": EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}[{{ p['text'] }}]{% endif %}{% endfor %}{% endif %}" + END,
}  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


RENAMES = int(version("transformers").split(".")[0]) >= 5  # says reasoning under all of its names


def theirs(template: str, chat: Sequence[Mapping[str, object]], **variables: object) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = variables.pop("tools", None)
    texts = render_jinja_template(
        [list(chat)], chat_template=template, add_generation_prompt=True, tools=tools,
        **NAMES, **variables,
    )  # fmt: skip
    text: str = (texts[0] if isinstance(texts, tuple) else texts)[0]
    return text


@pytest.mark.parametrize("construct", CONSTRUCTS)
@pytest.mark.parametrize("chat", [TALK, TOOLS], ids=["talk", "tools"])
def test_constructs_render_as_transformers_renders_them(
    construct: str, chat: list[Mapping[str, object]]
) -> None:
    template = CONSTRUCTS[construct]
    if construct == "whitespace" and chat is TOOLS:
        pytest.skip("it shows no message, so that nobody can tell whether it knows of tools")
    if "messages | tojson" in template and not RENAMES:
        pytest.skip("transformers 5 gives templates more names for reasoning than earlier ones")
    for variables in (
        {},
        {"tools": [SCHEMA], "enable_thinking": False, "reasoning_effort": "high"},
    ):
        knows = chat is TALK or "tool_calls" in template or "messages | tojson" in template
        wanted = theirs(template, chat if knows else TOLD, **dict(variables))
        ours = [_with_reasoning(message) for message in chat]
        assert render(template, [ours], {**NAMES, **variables}) == [wanted]


def test_parts_and_nothing_in_templates_that_know_neither() -> None:
    """`transformers` would print a list, or None, or fail."""
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    naive = EACH + "<{{ m.role }}>{{ '' + m['content'] }}" + END
    said = f"<user>a\nb<assistant>{WRITTEN}<assistant>{WRITTEN}"
    assert render(naive, [chat], {}) == [said]
    printing = EACH + "<{{ m.role }}>{{ m['content'] }}" + END
    assert render(printing, [chat], {}) == [said]
    assert render(CONSTRUCTS["parts"], [chat[:1]], {}) == ["[a][b]"]
    name = "{{ m.tool_calls[0].function.name }}"
    telling = "None is said. " + EACH + "{% if m.content is none %}" + name + "{% endif %}" + END
    assert render(telling, [chat[1:2]], {}) == ["None is said. add"]


def test_one_process_serves_all() -> None:
    render("{{ messages[0].content }}", [[USER]], {})
    process = templates._worker._process
    assert process is not None
    started = time.perf_counter()
    for _ in range(50):
        render("{{ messages[0].content }}", [[USER]], {})
    assert time.perf_counter() - started < 8.0  # a process each takes 0.2 s, on cores of one's own
    assert templates._worker._process is process
    with pytest.raises(TemplateError, match="no"):  # an error does not end it
        render("{{ raise_exception('no') }}", [[USER]], {})
    assert templates._worker._process is process
    process.kill()
    process.wait()
    assert render("{{ messages[0].role }}", [[USER]], {}) == ["user"]
    assert templates._worker._process is not process


def test_a_worker_that_ended_for_want_of_work_is_started_again() -> None:
    worker = Worker()
    job = {"template": "x", "chats": [[USER]], "names": {}, "seconds": 5, "most": 100}
    assert worker.ask(job) == {"texts": ["x"]}
    assert worker._process is not None
    assert worker._process.stdin is not None
    worker._process.stdin.write("")
    os.close(
        os.dup2(os.open(os.devnull, os.O_WRONLY), worker._process.stdin.fileno())
    )  # as its end
    for _ in range(3):
        assert worker.ask(job) == {"texts": ["x"]}
    worker.close()


def test_no_reply_is_another_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted render's reply comes late: to nobody."""
    slow = "{% for i in range(9000) %}{% for j in range(999) %}{% endfor %}{% endfor %}SECRET"
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            render(slow, [[USER]], {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for text in ("B", "C"):
        assert render(text, [[USER]], {}) == [text]


def test_an_interrupt_at_the_terminal_leaves_the_process() -> None:
    """Ctrl-C goes to every process of the terminal; this one says what becomes of it."""
    render("x", [[USER]], {})
    process = templates._worker._process
    assert process is not None
    process.send_signal(signal.SIGINT)
    assert render("y", [[USER]], {}) == ["y"]
    assert templates._worker._process is process


@pytest.mark.skipif(sys.platform == "win32", reason="there are no sessions")
def test_an_interrupt_at_the_terminal_does_not_reach_a_process_that_starts() -> None:
    """Until its first line runs, it cannot ignore one."""
    worker = Worker()
    process = worker._running()
    try:
        assert os.getsid(process.pid) == process.pid
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_renders_by_itself() -> None:
    render("x", [[USER]], {})
    with templates._worker._lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if render("z", [[USER]], {}) == ["z"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render("y", [[USER]], {}) == ["y"]


def test_what_the_process_says_at_its_end_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('the moon is in the way')")
    monkeypatch.setattr(templates, "CHILD", broken)
    worker = Worker()
    with pytest.raises(TemplateError, match=r"status 1: the moon is in the way"):
        worker.ask({})
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [])
    assert "No module named 'jinja2'; install jinja2" in worker.ask({})["error"]
    worker.close()


def test_packages_that_only_the_search_path_shows(tmp_path: Path) -> None:
    """pip install --user, PYTHONPATH: an isolated Python would not see them."""
    import jinja2

    code = (
        "import sys; from outsize.text.template import render\n"
        "print(render('{{ messages[0].role }}', [[{'role': 'user'}]], {}))"
    )
    source = str(Path(templates.__file__).parents[2])
    folders = [p for p in sys.path if Path(p, "jinja2").is_dir() or p == source]
    assert Path(jinja2.__file__).parent.parent.as_posix() in folders
    env = {"PYTHONPATH": os.pathsep.join([source, *folders]), "PATH": os.environ.get("PATH", "")}
    done = subprocess.run(
        [str(Path(sys.executable)), "-S", "-c", code], capture_output=True, text=True, env=env
    )
    assert done.stdout == "['user']\n", done.stderr


def test_a_python_is_found_where_sys_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("", None, "/usr/sbin/some-server"):
        monkeypatch.setattr(sys, "executable", executable)
        found = next(pythons(), None)
        assert found is not None
        assert Path(found).name.startswith("python3")
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(sys, name, "/nowhere")
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    with pytest.raises(
        TemplateError, match=r"no Python 3\.\d+ was found beside /nowhere; use --raw"
    ):
        Worker().ask({})


def pack_with(**named: str) -> Pack:
    made = object.__new__(Pack)
    object.__setattr__(made, "chat_templates", named)
    object.__setattr__(made, "path", Path("m"))
    return made


def test_named_templates() -> None:
    three = pack_with(default="d", tool_use="t", rag="r")
    assert choose(three, {}) == "d"
    assert choose(three, {"tools": [SCHEMA]}) == "t"
    assert choose(three, {"documents": ["x"]}) == "r"
    arguments: dict[str, object] = {"chat_template": "rag", "tools": [SCHEMA]}
    assert choose(three, arguments) == "r"
    assert "chat_template" not in arguments
    assert choose(pack_with(tool_use="t"), {}) == "t"
    with pytest.raises(
        OptionError, match="m has no default chat template; it has rag, tool_use: name one"
    ):
        choose(pack_with(tool_use="t", rag="r"), {})
    with pytest.raises(OptionError, match="no chat template 'x'; it has default, rag"):
        choose(three, {"chat_template": "x"})
    with pytest.raises(OptionError, match="'messages' is set by outsize"):
        choose(three, {"messages": []})


def test_arguments_are_json_where_they_can_be() -> None:
    told = [
        "enable_thinking=false",
        "reasoning_effort=high",
        "n=3",
        "text=a=b",
        "empty=",
        "no=False",
        "t=True",
        "z=None",
    ]
    assert parse_arguments(told) == {
        "enable_thinking": False, "reasoning_effort": "high", "n": 3, "text": "a=b", "empty": "",
        "no": False, "t": True, "z": None,
    }  # fmt: skip
    assert parse_arguments([]) is None
    with pytest.raises(
        OptionError, match="enable_thinking is true or false"
    ):  # a word would be true
        parse_arguments(["enable_thinking=off"])
    for bad in ("novalue", "=x", "a b=1"):
        with pytest.raises(OptionError, match="KEY=VALUE is expected"):
            parse_arguments([bad])


def test_a_refusal_is_said_in_the_templates_own_words() -> None:
    words = "{{ raise_exception('System role\n not supported') }}"
    with pytest.raises(TemplateError, match=r"refuses these messages: System role not supported$"):
        render(words, [[USER]], {})


def test_the_time_zone_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = set()
    for zone in ("UTC-3", "UTC-9"):
        monkeypatch.setenv("TZ", zone)
        worker = Worker()
        job = {
            "template": "{{ strftime_now('%H') }}",
            "chats": [[USER]],
            "names": {},
            "seconds": 5,
            "most": 9,
        }
        hours.add(worker.ask(job)["texts"][0])
        worker.close()
    assert len(hours) == 2


def test_messages_that_are_not_json() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(OptionError, match="must be JSON"):
        render("x", [[USER]], {"deep": deep})
    assert parse_arguments(["x=" + "[" * 5000]) == {"x": "[" * 5000}
    with pytest.raises(OptionError, match="must be JSON"):
        render("x", [[{"role": "user", "content": "a", "time": object()}]], {})
