"""What goes in and what comes out, end to end, of models that say what they are told."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import outsize
from outsize.cli import session as terminal
from outsize.cli.main import main
from outsize.engine.conversation import Conversation
from outsize.engine.model import Model
from outsize.errors import ContextError, OptionError
from outsize.options import Options
from tests import scripted

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is defined %}{{ think }}{% endif %}"
    "{% endif %}"
)
TURNS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """Thinks "w.", answers "Yes!"."""
    made = scripted.byte_tokenizer(TURNS, ["<think>", "</think>", "w.", "Yes!"])
    chain = ["Ċ", "<think>", "w.", "</think>", "Yes!", "<|im_end|>"]
    return scripted.write(tmp_path_factory.mktemp("thinker"), made, chain, CHATML, eos_token_id=257)


@pytest.fixture(scope="module")
def model(thinker: Path) -> Iterator[Model]:
    with outsize.load(str(thinker), quiet=True) as opened:
        yield opened


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["outsize", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code in (0, None), said.err
    return said.out, said.err


def test_reasoning_is_apart(model: Model) -> None:
    reply = model.generate("hi", max_tokens=30)[0]
    assert (reply.text, reply.reasoning, reply.finish) == ("Yes!", "w.", "stop")
    assert reply.to_json()["reasoning"] == "w."
    streaming = model.stream("hi", max_tokens=30)
    assert list(streaming.parts) == [("reasoning", "w."), ("text", "Yes!")]
    assert "".join(model.stream("hi", max_tokens=30)) == "Yes!"
    raw = model.generate("hi\n", raw=True, max_tokens=30)[0]
    assert (raw.text, raw.reasoning) == ("<think>w.</think>Yes!", "")


def test_a_template_that_begins_the_block(model: Model) -> None:
    reply = model.generate("hi", max_tokens=30, template_args={"think": "<think>"})[0]
    assert (reply.text, reply.reasoning) == ("Yes!", "w.")
    with pytest.raises(OptionError, match="template_args is 5"):
        model.generate("hi", template_args=5)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="template arguments need a chat template"):
        model.generate("hi", raw=True, template_args={"think": "x"})


def test_history_has_no_reasoning(model: Model) -> None:
    chat = model.conversation(max_tokens=30)
    assert list(chat.parts("hi")) == [("reasoning", "w."), ("text", "Yes!")]
    assert chat.messages[-1] == {"role": "assistant", "content": "Yes!"}
    assert "".join(chat.say("again")) == "Yes!"


def test_what_a_terminal_shows(
    thinker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("run", str(thinker), "hi", "-q")
    assert run(capsys, monkeypatch, *ask)[0] == "Yes!\n"
    shown = run(capsys, monkeypatch, *ask, "--show-thinking")[0]
    assert shown == "<think>\nw.\n</think>\n\nYes!\n"
    began = run(capsys, monkeypatch, *ask, "--template-arg", "think=<think>")[0]
    assert began == "Yes!\n"
    as_json = json.loads(run(capsys, monkeypatch, *ask, "--json")[0])
    assert (as_json["text"], as_json["reasoning"]) == ("Yes!", "w.")
    cut = run(capsys, monkeypatch, "run", str(thinker), "hi", "-n", "2")
    assert "the model thought (2 characters) and gave no answer; --show-thinking" in cut[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thinking_is_dim_where_a_person_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, wanted in (
        (None, "\033[2mw.\033[0m\n\nYes!\n"),
        ("1", "<think>\nw.\n</think>\n\nYes!\n"),
    ):
        monkeypatch.setattr(sys, "stdout", screen := Terminal())
        monkeypatch.setenv("NO_COLOR", variable or "")
        terminal.show(iter([("reasoning", "w."), ("text", "Yes!")]), shown=True)
        assert screen.getvalue() == wanted
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    terminal.show(iter([("reasoning", "w."), ("text", "Yes!")]), shown=True, thinking=False)
    assert screen.getvalue() == "Yes!\n"


def test_a_stop_that_is_a_control_token(tmp_path: Path, home: Path) -> None:
    made = scripted.byte_tokenizer(["<s>", "<stop>", "</s>"], ["Hello", "more"])
    chain = ["Ċ", "Hello", "<stop>", "more", "</s>"]
    folder = scripted.write(
        tmp_path / "m", made, chain, "{{ messages[0].content }}\n\n", eos_token_id=258
    )
    with outsize.load(str(folder), quiet=True) as model:
        assert model.generate("hi", max_tokens=9)[0].text == "Hellomore"
        for stop in ("<stop>", ["x", "<stop>"]):
            reply = model.generate("hi", max_tokens=9, stop=stop)[0]
            assert (reply.text, reply.finish) == ("Hello", "stop")


def test_tokens_that_the_embedding_has_no_row_for(tmp_path: Path, home: Path) -> None:
    """As Gemma 3's image token in models of text alone: refused by name, not read from beyond."""
    made = scripted.byte_tokenizer(["<s>", "</s>", "<image>"])
    folder = scripted.write(
        tmp_path / "m", made, ["a", "</s>"], "{{ messages[0].content }}<image>", rows=258
    )
    with outsize.load(str(folder), quiet=True) as model:
        with pytest.raises(
            OptionError,
            match="'<image>', token 258 of the tokenizer, and the model's embedding has 258 rows",
        ):
            model.generate("hi")
        with pytest.raises(OptionError, match="'<image>'"):
            model.generate("<image>", raw=True, special=True)
        with pytest.raises(OptionError, match="'<image>'"):
            model.score_tokens([1, 258])
        assert model.generate("<image>", raw=True, max_tokens=2)[0].new_tokens >= 1  # as text


def test_special_is_for_raw_prompts(model: Model) -> None:
    ids = model.encode(["a<|im_end|>"], Options(raw=True, special=True))[0]
    assert ids[-1] == 257
    assert 257 not in model.encode(["a<|im_end|>"], Options(raw=True))[0]
    with pytest.raises(OptionError, match="raw prompts alone; add --raw"):
        model.generate("a", special=True)
    assert len(model.score("<|im_end|>").tokens) == len("<|im_end|>")


def chat_says(chat: Conversation) -> Callable[[int], None]:
    """Asks, and expects the answer, if not the whole of it where the context ends."""

    def say(number: int) -> None:
        assert "Yes!".startswith("".join(chat.say(f"question {number}")))

    return say


def test_a_chat_that_outgrows_its_context(thinker: Path) -> None:
    with outsize.load(str(thinker), quiet=True, context=128) as model:
        chat = model.conversation(max_tokens=20)
        with pytest.raises(
            ContextError, match=r"holds 128; /reset forgets .*drop-oldest.*--context"
        ):
            list(map(chat_says(chat), range(9)))
        kept = len(chat.messages)
        assert kept >= 4  # what was said is not lost by the error
        chat.overflow = "drop-oldest"
        for i in range(5):
            assert "".join(chat.say(f"question {i}")) == "Yes!"
        assert chat.dropped >= 2
        assert chat.messages[0]["role"] == "user"
        with pytest.raises(ContextError, match="this message alone does not fit: shorten it"):
            list(chat.say("x" * 200))
        with pytest.raises(OptionError, match="overflow is 'drop'; known are error, drop-oldest"):
            model.conversation("drop")


def test_overflow_at_the_terminal(
    thinker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"question number {i}" for i in range(4)]
    ask = ("chat", str(thinker), "-c", "128", "-n", "20", "-q")
    for told, answers in (([], 3), (["--overflow", "drop-oldest"], 4)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        out, err = run(capsys, monkeypatch, *ask, *told)
        assert out.count("Yes!") == answers
        assert ("/overflow drop-oldest" in err) == (not told)
        assert ("old messages were let go" in err) == bool(told)
    lines.insert(2, "/overflow drop-oldest\n/overflow x")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, err = run(capsys, monkeypatch, *ask)
    assert out.count("Yes!") == 4
    assert "overflow is 'x'; known are" in err
