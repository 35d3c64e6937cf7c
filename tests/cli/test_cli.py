"""The command line, as a person would use it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outsize.cli.flags import DisplayOptions
from outsize.cli.run import understand
from outsize.cli.session import answer, interrupts
from outsize.engine import stream as streaming
from outsize.errors import OptionError
from outsize.options import LoadOptions, Options
from tests.command import outsize

FIELDS = [
    "text",
    "prompt_tokens",
    "new_tokens",
    "first_token_s",
    "tokens_per_s",
    "prefill_tokens_per_s",
    "peak_memory_bytes",
    "bytes_read",
    "model",
    "options",
]


@pytest.fixture
def tiny(folder_of: Callable[[str], Path]) -> str:
    return str(folder_of("llama"))


def test_json_and_text_agree_and_nothing_else_is_on_stdout(tiny: str) -> None:
    command = [sys.executable, "-c", "from outsize.cli.main import main; main()"]
    text = subprocess.run(
        [*command, "run", tiny, "hello", "-n", "8"], capture_output=True, text=True, timeout=120
    )
    assert text.returncode == 0, text.stderr
    assert "8 tokens at" in text.stderr
    shown = outsize("run", tiny, "hello", "-n", "8", "--json", "-q")
    reply = json.loads(shown.stdout)
    assert set(FIELDS) <= set(reply)
    assert text.stdout == reply["text"] + "\n"
    assert shown.stderr == ""


def test_standard_input(tiny: str) -> None:
    direct = json.loads(outsize("run", tiny, "hello", "-n", "4", "--json").stdout)
    for words in (("run", "-m", tiny, "-"), ("run", tiny)):
        piped = outsize(*words, "-n", "4", "--json", stdin="hello")
        assert json.loads(piped.stdout)["text"] == direct["text"]


def test_precedence_flag_environment_file(tiny: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("max_tokens = 3\ntop-k = 7\n")

    def tokens(*flags: str, **env: str) -> tuple[int, int]:
        done = outsize("run", tiny, "hi", "--json", *flags, OUTSIZE_CONFIG=str(config), **env)
        options = json.loads(done.stdout)["options"]
        return options["max_tokens"], options["top_k"]

    assert tokens() == (3, 7)
    assert tokens(OUTSIZE_MAX_TOKENS="4") == (4, 7)
    assert tokens("-n", "5", OUTSIZE_MAX_TOKENS="4") == (5, 7)


@pytest.mark.parametrize("text", ["max_tokns = 3", "max_tokens = = 3"])
def test_a_bad_config_file_is_named(text: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    done = outsize("version", OUTSIZE_CONFIG=str(config))
    assert done.returncode == 2
    assert str(config) in done.stderr
    if "tokns" in text:
        assert "did you mean 'max_tokens'" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        (("run", "no/such.gguf", "hi"), 2, "no such model"),
        (("run", "{tiny}", "hi", "--top-p", "3"), 2, "top_p is 3.0"),
        (("run", "{tiny}", "hi", "-c", "9"), 2, "the context holds 9"),
        (("run", "{tiny}", "hi", "--encodng", "x"), 2, "No such option"),
        (("run", "{tiny}", "hi", "--encoding", "x"), 2, "encoding 'x' is not known"),
        (("run", "a", "b", "c"), 2, "put the prompt in quotes"),
        (("rm", "nothing"), 2, "no pack named 'nothing'"),
        (("bench", "quality", "{tiny}"), 2, "--text FILE or --tasks"),
        (("bench", "quality", "{tiny}", "--text", "nofile"), 2, "no such text file"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], status: int, problem: str, tiny: str
) -> None:
    done = outsize(*(w.replace("{tiny}", tiny) for w in words))
    assert done.returncode == status
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_damaged_pack_is_a_failure_not_a_mistake(tiny: str, own_home: Path) -> None:
    assert outsize("pack", tiny, "-q").returncode == 0
    (records,) = own_home.glob("packs/*/embed.records")
    data = bytearray(records.read_bytes())
    data[100] ^= 1
    records.write_bytes(data)
    done = outsize("run", tiny, "hi")
    assert done.returncode == 1
    assert "embed.records does not match its checksum" in done.stderr


def test_understand() -> None:
    assert understand(["hello"], None)[1] == "hello"
    assert understand(["hf:a/b", "hello"], None) == ("hf:a/b", "hello")
    assert understand(["package:a==1", "x"], None) == ("package:a==1", "x")
    assert understand(["."], "m") == ("m", ".")
    with pytest.raises(OptionError, match="2 prompts"):
        understand(["a", "b"], "m")
    for blank in ("", " \n"):  # as an empty variable of a script
        with pytest.raises(OptionError, match="the prompt is blank"):
            understand([blank], "m")


@pytest.mark.usefixtures("own_home")
def test_list_rm_version_doctor(tiny: str) -> None:
    assert "no packs in" in outsize("list").stdout
    outsize("pack", tiny, "-q")
    (pack,) = json.loads(outsize("list", "--json").stdout)
    assert pack["family"] == "llama"
    assert pack["name"] in outsize("list").stdout
    assert "removed" in outsize("rm", pack["name"]).stdout
    assert outsize("version").stdout.startswith("outsize 0.")
    assert outsize("--version").stdout == outsize("version").stdout
    seen = json.loads(outsize("doctor", "--json").stdout)
    assert seen["memory_bytes_per_s"] > 1e8
    assert seen["disk_bytes_per_s"] > 1e6
    assert isinstance(seen["complaints"], list)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['outsize', '--help']\n"
        "from outsize.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout[-200:]


def test_bench_speed_ends_with_json(tiny: str) -> None:
    done = outsize(
        "bench", "speed", tiny, "--prompt-tokens", "20", "--new-tokens", "4", "--repeats", "2"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["decode_all"]) == 2
    assert "at most" in done.stdout.splitlines()[1]


class Terminal:
    """A pseudo-terminal around `outsize chat`."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", "from outsize.cli.main import main; main()", *words]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = ""

    def until(self, text: str, start: int = 0) -> int:
        deadline = time.time() + 60
        while text not in self.seen[start:] and time.time() < deadline:
            try:
                self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:
                break
        assert text in self.seen[start:], self.seen
        return len(self.seen)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_chat_on_a_terminal(tiny: str) -> None:
    t = Terminal("chat", tiny, "-n", "4")
    at = t.until("> ")
    t.type("hello\n")
    at = t.until("> ", at)
    t.type("/stats\n")
    at = t.until("1 turns, 4 tokens answered", at)
    t.type("/system be brief\n/reset\n/nonsense\n")
    at = t.until("/reset forgets", at)
    t.type("/bye\n")
    assert t.process.wait(30) == 0


def test_ctrl_c_stops_the_reply_and_twice_quits() -> None:
    stopped = []
    before = signal.getsignal(signal.SIGINT)
    with interrupts(lambda: stopped.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert stopped == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_reply_is_shown_and_accounted(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first piece: what was said stays, the account is printed, status 130."""
    parts = streaming.Streaming._go

    def interrupted(self: streaming.Streaming) -> Iterator[tuple[str, str]]:
        for part in parts(self):
            yield part
            signal.raise_signal(signal.SIGINT) if not self.request.seq.finish else None

    monkeypatch.setattr(streaming.Streaming, "_go", interrupted)
    with pytest.raises(SystemExit) as left:
        answer(tiny, "hello", LoadOptions(), Options(max_tokens=50), DisplayOptions())
    assert left.value.code == 130
    shown = capsys.readouterr()
    assert len(shown.out) > 1
    assert "tokens at" in shown.err
    assert "50 tokens" not in shown.err


def test_a_schema_or_a_grammar_that_the_answer_obeys(tiny: str, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "ä"}}, "required": ["a"]}
    file, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    file.write_text("\ufeff" + json.dumps(schema | {"additionalProperties": False}))
    grammar.write_text('start: "yes" | "no"')
    for given in (file.read_text().removeprefix("\ufeff"), str(file)):
        done = outsize("run", tiny, "hi", "-q", "--schema", given)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"a": "ä"})
    done = outsize("run", tiny, "hi", "-q", "--grammar", str(grammar))
    assert done.stdout in ("yes\n", "no\n")
    told = json.loads(
        outsize("run", tiny, "hi", "--json", "-q", "--schema", "true", "-n", "4").stdout
    )
    assert told["options"]["schema"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schema", "{oops"], "--schema is not JSON"),
        (["--schema", "{" + '"a":{' * 100_000], "--schema is nested too deeply"),
        (["--schema", "missing.json"], "--schema 'missing.json' cannot be read: No such file"),
        (["--schema", '{"type": "hiccup"}'], "the schema cannot be used: Invalid type: hiccup"),
        (["--grammar", "missing.lark"], "--grammar 'missing.lark' cannot be read: No such file"),
        (["--schema", "{}", "--grammar", __file__], "schema and grammar are both given"),
        (["--grammar", __file__], "the grammar cannot be used"),
    ],
)
def test_what_is_no_schema(words: list[str], said: str, tiny: str) -> None:
    done = outsize("run", tiny, "hi", "-q", *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_log_probabilities_biases_and_penalties(tiny: str) -> None:
    words = ["--logit-bias", "65=100", "--presence-penalty", "0.5", "--ignore-eos", "-n", "3", "-q"]
    done = outsize("run", tiny, "hi", "--json", "--logprobs", "2", *words)
    told = json.loads(done.stdout)
    assert [one["token"] for one in told["logprobs"]] == [65, 65, 65]
    assert [len(one["top"]) for one in told["logprobs"]] == [2, 2, 2]
    assert "add --json" in outsize("run", tiny, "hi", "--logprobs", "2").stderr
    assert "ID=BIAS" in outsize("run", tiny, "hi", "--logit-bias", "x").stderr
