"""Places where people run it: pipes, consoles, locales, prompts that look like something else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from outsize.cli import console, session, settings
from outsize.cli import run as terminal
from outsize.cli.console import arguments, text_of
from outsize.cli.flags import FLAGS
from outsize.cli.main import app
from outsize.errors import DiskFullError, OptionError, SourceError
from outsize.options import LoadOptions, Options
from outsize.text.channels import Piece
from tests.command import outsize

CODE = "from outsize.cli.main import main; main()"


@pytest.fixture
def tiny(folder_of: Callable[[str], Path]) -> str:
    return str(folder_of("llama"))


def process(*words: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own, whose streams have an encoding of theirs."""
    return subprocess.run(
        [sys.executable, "-c", CODE, *words],
        input=stdin, capture_output=True, env=os.environ | env, timeout=120,
    )  # fmt: skip


def test_bytes_that_are_no_text() -> None:
    """UTF-8 in a locale that does not know it is UTF-8; what is none in UTF-8 either becomes U+FFFD."""
    for encoding in ("ascii", "utf-8"):
        raw = "café".encode().decode("ascii", "surrogateescape")
        assert text_of(raw, encoding) == "café"
        assert text_of("caf\udce9", encoding) == "caf\ufffd"
    assert text_of("\ufeffcafé", "latin-1") == "café"
    assert text_of("a\ud800", "utf-8") == "a\ud800"  # refused where tokens are made


@pytest.mark.parametrize(
    ("call", "encoding"),
    [
        (outsize, {}),
        pytest.param(
            process,
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_prompts_that_are_not_utf8(
    call: Callable[..., subprocess.CompletedProcess[Any]], encoding: dict[str, str], tiny: str
) -> None:
    how = ("-n", "1", "-q", "--json")
    found = [
        call("run", tiny, os.fsdecode(b"caf\xe9"), *how, **encoding),
        call("run", tiny, *how, stdin=b"caf\xe9", **encoding),
        outsize("run", tiny, "caf\ufffd", *how),
    ]
    counts = []
    for done in found:
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout)["prompt_tokens"])
    assert len(set(counts)) == 1
    assert all("1 bytes of the text are not UTF-8" in str(done.stderr) for done in found[:2])
    chat = call("chat", tiny, "-n", "1", "-q", stdin=b"caf\xe9\n/bye\n", **encoding)
    assert "are not UTF-8" in str(chat.stderr)
    assert "error" not in str(chat.stderr)


def test_a_console_that_lacks_characters(tiny: str) -> None:
    """Pieces of an answer, and of JSON, at a console of ASCII or a Windows code page."""
    code = (
        "from outsize.cli import console; from outsize.cli import session; console.prepare()\n"
        "session.show(iter([('text', 'caf\\xe9 \\u03a9 '), ('text', '\\ud83d')]), True)\n"
        f"{CODE}"
    )
    how = ("run", tiny, "a", "-n", "40", "-q", "--json", "--temperature", "2", "--seed", "1")
    here = outsize(*how)
    for name, shown in (("ascii", b"caf? ? ?\n"), ("cp1252", b"caf\xe9 ? ?\n")):
        env = os.environ | {"PYTHONIOENCODING": name}
        there = subprocess.run([sys.executable, "-c", code, *how], capture_output=True, env=env)
        line, _, reply = there.stdout.partition(b"\n")
        assert (line + b"\n", there.stderr) == (shown, b"")
        assert json.loads(reply)["text"] == json.loads(here.stdout)["text"]


@pytest.mark.parametrize("prompt", ["~100 words about cats", "~nobodyhere/x"])
def test_a_prompt_that_begins_like_a_home(prompt: str) -> None:
    assert terminal.understand([prompt], None)[1] == prompt


def test_homes_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIZE_CONFIG", "~nobodyhere/config.toml")
    assert settings.config_path() == Path("~nobodyhere/config.toml")
    with pytest.raises(SourceError, match="no such model"):
        CliRunner().invoke(app, ["run", "~nobodyhere/x", "hi"], catch_exceptions=False)


def test_a_prompt_that_is_a_name_of_something_else(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for name in (str(tmp_path), str(tmp_path / "notes.txt"), "/etc"):
        with pytest.raises(OptionError, match="is there, and no model; if it is a prompt"):
            terminal.understand([name], None)
        assert terminal.understand([name], "m") == ("m", name)
    (tmp_path / "blob").write_bytes(b"GGUF....")
    for name in (tiny, str(tmp_path / "blob")):
        assert terminal.understand([name, "hi"], None) == (name, "hi")


def test_prompts_that_begin_with_a_dash(tiny: str) -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    for told, front, behind in (
        (["-m", "M", "-5 + 3 = ?"], ["-m", "M"], ["-5 + 3 = ?"]),
        (["M", "- one\n- two", "-n", "3"], ["M", "-n", "3"], ["- one\n- two"]),
        (["-m", "M", "--more cats please", "-q"], ["-m", "M", "-q"], ["--more cats please"]),
        (["-m", "M", "-5"], ["-m", "M"], ["-5"]),
        (["--system", "- be brief", "hi", "--", "-x"], ["--system", "- be brief", "hi"], ["-x"]),
    ):
        assert arguments(told, command) == [*front, "--", *behind]
    for told in (
        ["--stop=a b", "x"],
        ["--encodng", "x"],
        ["-q", "hi"],
        ["-", "-n", "3"],
        ["--no-raw"],
    ):
        assert arguments(told, command) == told
    done = outsize("run", "-m", tiny, "-5 + 3 = ?", "-n", "1", "-q")
    assert done.returncode == 0, done.stderr


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd()); {CODE}"
    done = subprocess.run([sys.executable, "-c", code, "run", "hi"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working folder is gone")
    assert done.stderr.count("\n") == 1


def variables() -> list[tuple[str, str]]:
    commands = settings._leaves(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    kinds = settings.kinds(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    found = {p.envvar: kinds[p.name].__name__ for c in commands for p in c.params if p.envvar}
    return sorted(found.items())


def of_command(variable: str) -> str:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        if variable in [p.envvar for p in command.params]:
            return str(name)
    return ""


@pytest.mark.parametrize(("variable", "kind"), variables())
def test_variables_that_are_empty_or_malformed(
    variable: str, kind: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is none; one that is no number is named."""
    command = of_command(variable)
    seen: list[object] = []
    monkeypatch.setattr(session, "answer", lambda *a: seen.append(a))
    if command == "run":
        done = CliRunner().invoke(app, ["run", tiny, "hi"], env={variable: ""})
        assert done.exit_code == 0, done.output
        assert seen
    if kind in ("int", "float", "bool") and command:
        words = {"run": [tiny, "hi"], "trace": [tiny, "--prompts", "p", "-o", "o"]}
        words = words | {"inspect": [tiny, "a"]}
        done = CliRunner().invoke(app, [command, *words.get(command, [])], env={variable: "12x"})
        assert done.exit_code == 2
        assert variable in done.output


def test_empty_homes_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OUTSIZE_HOME", "OUTSIZE_CONFIG"):
        monkeypatch.setenv(name, "")
    assert settings.config_path().name == "config.toml"
    assert settings.config_path() != Path("config.toml")


def test_every_option_is_a_flag() -> None:
    known = {f.name for kind in (LoadOptions, Options) for f in fields(kind)}
    inner = {"defaults", "grammars", "continue_final", "show_tokens"}  # of programs alone
    assert known - inner == set(FLAGS)


def test_a_variable_that_is_misspelled(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.check_environment(app)
    monkeypatch.setenv("OUTSIZE_MEMRY", "1GB")
    with pytest.raises(OptionError, match=r"OUTSIZE_MEMRY is set.*did you mean OUTSIZE_MEMORY"):
        settings.check_environment(app)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('max_tokens = "many"', "setting 'max_tokens' is 'many'; a whole number"),
        ("max_tokens = true", "setting 'max_tokens' is True"),
        ("context = 1.5", "setting 'context' is 1.5"),
        ("quiet = 3", "setting 'quiet' is 3; true or false is expected"),
        ("memory = [1]", r"setting 'memory' is \[1\]"),
        ("stop = 3", "setting 'stop' is 3"),
    ],
)
def test_settings_of_another_kind(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text(text)
    monkeypatch.setenv("OUTSIZE_CONFIG", str(tmp_path / "c.toml"))
    with pytest.raises(OptionError, match=f"c.toml: {said}"):
        settings.default_map(app)
    (tmp_path / "c.toml").write_text('stop = "x"\nmemory = "1GB"\ncontext = 512\ntemperature = 1')
    assert settings.default_map(app)["run"]["stop"] == ["x"]
    monkeypatch.setenv("OUTSIZE_CONFIG", str(tmp_path))
    with pytest.raises(OptionError, match="is a folder"):
        settings.default_map(app)


def shell(script: str, tiny: str, **env: str) -> subprocess.CompletedProcess[str]:
    run = f"{sys.executable} -c '{CODE}'"
    text = script.replace("outsize", run).replace("TINY", tiny)
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env=os.environ | env
    )


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("outsize run TINY hello -n 300 -q | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        ("outsize list --json | true; exit ${PIPESTATUS[0]}", None, ""),
        ("TERM= COLUMNS=x outsize run TINY hi -n 1 -q >&-", 0, ""),
        ("outsize run TINY hi -n 1 -q >/dev/full", 1, "error: the output cannot be"),
        ("outsize run -m TINY -n 1 -q <&-", 2, "error: standard input holds no prompt"),
        ("TERM=dumb NO_COLOR=1 COLUMNS=1 outsize run TINY hi -n 1 <&- 2>&-", 0, ""),
        ("COLUMNS=1 outsize run --help >/dev/null", 0, ""),
    ],
)
def test_streams(script: str, status: int | None, said: str, tiny: str) -> None:
    done = shell(script, tiny)
    assert status is None or done.returncode == status, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (1 if said else 0), done.stderr


def test_an_empty_input(tiny: str) -> None:
    done = outsize("run", "-m", tiny, "-n", "1", "-q")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input holds no prompt")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_no_traceback() -> None:
    assert isinstance(console.failure(OSError(28, "No space left", "a")), DiskFullError)
    assert "b cannot be read or written: Permission" in str(
        console.failure(PermissionError(13, "Permission denied", "b"))
    )


@pytest.mark.parametrize("at", ["fetch.find", "fetch.pack", "weights.load", "batch.Batch.step"])
@pytest.mark.usefixtures("own_home")
def test_an_interrupt_in_each_phase(at: str, tiny: str) -> None:
    """While looking, packing, loading and answering: status 130, one line, nothing half made."""
    where, _, name = at.rpartition(".")
    modules = {"fetch": "outsize.pack.fetch", "weights": "outsize.weights.load"}
    target = "outsize.engine.batch.Batch" if where.startswith("batch") else modules[where]
    code = (
        "import outsize, outsize.pack.fetch, outsize.engine.model, outsize.weights.load, os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "def wait(*a, **k):\n os.kill(os.getpid(), signal.SIGINT); time.sleep(5); yield\n"
        f"{target}.{name} = lambda *a, **k: next(wait())\n"
        f"{CODE}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", tiny, "hi", "-q", "-n", "2"], capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    if name != "step":  # which ends the reply
        assert done.stderr == "interrupted\n"


BAD_MODELS = ("missing.gguf", "hf:x", "package:x", "empty", "text.gguf", "cut.safetensors")
BAD_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("--memory", "lots"), ("--memory", "1MB"), ("--memory", "0%"), ("-c", "1"), ("-c", "99999999"),
    ("-t", "0"), ("--encoding", "int3"), ("--experts", "lru"), ("--experts", "nothing"),
    ("--experts", "lru,prefetch=top:x"), ("--draft", "nothing"), ("--draft", "ngram:k=99"),
    ("--draft", "masks:nofile"), ("--draft", "masks:{lora}"), ("--draft", "masks:{text}"),
    ("--draft", "model:nofile"),
)  # fmt: skip


@pytest.mark.parametrize("case", [*BAD_MODELS, *BAD_OPTIONS], ids=str)
def test_plan_and_run_say_the_same(case: str | tuple[str, ...], tiny: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("text.gguf", "cut.safetensors"):
        (tmp_path / name).write_text("no weights")
    if isinstance(case, str):
        known = ":" in case
        model, flags = case if known else str(tmp_path / case), ()
    else:
        model = tiny
        fill = {"{lora}": str(tmp_path / "empty"), "{text}": str(tmp_path / "text.gguf")}
        flags = tuple(_filled(w, fill) for w in case)
    said = []
    for words in (("plan", model, *flags, "-q"), ("run", model, "hi", *flags, "-q", "-n", "1")):
        with pytest.raises(Exception) as e:  # noqa: PT011
            CliRunner().invoke(app, list(words), catch_exceptions=False)
        said.append((type(e.value), re.sub(r"runtime \d+|least \d+", "", str(e.value))))  # grows
    assert said[0] == said[1]


def _filled(word: str, fill: dict[str, str]) -> str:
    for name, value in fill.items():
        word = word.replace(name, value)
    return word


def test_a_refused_turn_prints_no_empty_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def parts(*said: str) -> Iterator[Piece]:
        yield from (("text", piece) for piece in said)
        raise OptionError("no")

    for said, printed in (((), ""), (("a",), "a\n")):
        with pytest.raises(OptionError):
            session.show(parts(*said), shown=True)
        assert capsys.readouterr().out == printed
