"""Reasoning apart from the answer: gpt-oss's channels and think blocks, however the tokens fall."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from outsize.text.channels import PLAIN, Format, format_of
from outsize.text.detokenize import Stops, Stream
from outsize.text.tokens import Tokens

MARKERS = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<|constrain|>",
]


def tokens(special: list[str] | None = None, plain: list[str] | None = None) -> Tokens:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special or []))
    made.add_tokens([AddedToken(p, normalized=False) for p in plain or []])
    return Tokens(made, None, False)


def say(
    t: Tokens, text: str, form: Format | None = None, stops: tuple[str, ...] = ()
) -> tuple[str, str]:
    """(answer, reasoning) of a reply, token by token."""
    stream = Stream(t, stops, form)
    ids = t.encode(text, special=True)
    return "".join(stream.push(i) for i in ids) + stream.finish(), stream.reasoning


HARMONY = [
    (
        "<|channel|>analysis<|message|>User asks 2+2.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is 4.",
        ("It is 4.", "User asks 2+2."),
    ),
    ("<|channel|>final<|message|>4", ("4", "")),
    ("<|message|>no channel", ("no channel", "")),
    ("<|channel|>analysis<|message|>cut off, 日", ("", "cut off, 日")),
    ("<|channel|>ana", ("", "")),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I will look.<|end|>",
        ("I will look.", "a\nb"),
    ),
    ("<|channel|>analysis<|message|>a<|end|>b", ("b", "a")),
    (
        '<|channel|>commentary to=functions.add<|constrain|>json<|message|>{"a": 1}<|call|>',
        ('functions.add {"a": 1}', ""),
    ),
    (
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
        ('functions.add {"a": 1}', ""),
    ),
    (
        '<|start|>assistant to=functions.add<|channel|>commentary<|constrain|>json<|message|>{"a": 1}',
        ('functions.add {"a": 1}', ""),
    ),
]


@pytest.mark.parametrize(("said", "wanted"), HARMONY)
def test_harmony(said: str, wanted: tuple[str, str]) -> None:
    t = tokens(MARKERS)
    form = format_of(t, None)
    assert len(form.harmony) == 4
    assert say(t, said, form) == wanted
    prompt = t.encode("<|start|>user<|message|>hi<|end|><|start|>assistant", special=True)
    assert form.after(t, prompt).opened
    if said.startswith("<|channel|>"):
        assert say(t, said, form.after(t, prompt)) == wanted


def test_a_header_that_the_prompt_begins() -> None:
    t = tokens(MARKERS)
    form = format_of(t, None).after(t, t.encode("<|start|>assistant", special=True))
    said = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    assert say(t, said, form) == ('functions.add {"a": 1}', "")
    for said in ("I'm sorry, but I can't help.", "to", " today", "t"):  # without any header
        assert say(t, said, form) == (said, "")
    whole = format_of(t, None).after(t, t.encode("<|start|>assistant<|message|>", special=True))
    assert say(t, "hi", whole) == ("hi", "")


THINK = [
    ("<think>\nwell\n</think>\n\nYes.", ("Yes.", "\nwell\n")),
    ("\n <think>a</think>b", ("b", "a")),
    ("<think></think>Yes <think>no</think>", ("Yes <think>no</think>", "")),
    ("Yes, <think> is a tag", ("Yes, <think> is a tag", "")),
    ("<thin ice", ("<thin ice", "")),
    ("<thi", ("<thi", "")),
    ("<think>cut </thi", ("", "cut </thi")),
    ("<think>a</b></thinker></think>日本", ("日本", "a</b></thinker>")),
    ("  leading", ("  leading", "")),
    ("", ("", "")),
]


@pytest.mark.parametrize("where", ["plain tokens", "control tokens", "no tokens"])
@pytest.mark.parametrize(("said", "wanted"), THINK)
def test_think_blocks(where: str, said: str, wanted: tuple[str, str]) -> None:
    tags = ["<think>", "</think>"]
    t = tokens(
        tags if where == "control tokens" else None, tags if where == "plain tokens" else None
    )
    form = format_of(t, "{{ '<think>' }}" if where == "no tokens" else None)
    assert form.tags == ("<think>", "</think>")
    answer, thought = say(t, said, form)
    if (
        where == "control tokens" and said.count("<think>") > 1
    ):  # later ones are dropped, as control tokens
        assert answer.replace("<think>", "").replace("</think>", "") == "Yes no"
        return
    assert (answer, thought) == wanted


def test_a_block_that_the_prompt_begins() -> None:
    t = tokens(plain=["<think>", "</think>"])
    form = format_of(t, None)
    opened = form.after(t, t.encode("<s>user<think>\n", special=True))
    assert say(t, "so\n</think>\n\n4", opened) == ("4", "so\n")
    closed = form.after(t, t.encode("<think>\n\n</think>\n\n", special=True))
    assert say(t, "4", closed) == ("4", "")
    special = tokens(["<think>", "</think>"])
    assert format_of(special, None).after(special, special.encode("<think>\n", special=True)).opened


def test_tags_that_only_the_template_names() -> None:
    t = tokens()
    form = format_of(t, "{{ content.split('</think>')[-1] }}")
    assert say(t, "<think>a</think>b", form) == ("b", "a")


def test_models_without_either_say_everything() -> None:
    t = tokens()
    assert format_of(t, "{{ messages }}") is PLAIN
    assert say(t, "<think>a</think>b", PLAIN) == ("<think>a</think>b", "")


def test_stop_strings_are_looked_for_in_the_answer() -> None:
    t = tokens(plain=["<think>", "</think>"])
    form = format_of(t, None)
    assert say(t, "<think>one STOP two</think>three STOP four", form, ("STOP",)) == (
        "three ",
        "one STOP two",
    )
    m = tokens(MARKERS)
    said = "<|channel|>analysis<|message|>STOP<|end|><|start|>assistant<|channel|>final<|message|>a STOP b"
    assert say(m, said, None, ("STOP",)) == ("a ", "STOP")


def test_streamed_text_is_the_whole_text() -> None:
    """However characters and tags fall on tokens, nothing is lost and no half character is shown."""
    r, t = random.Random(0), tokens(plain=["<think>", "</think>"])
    form, alphabet = (
        format_of(t, None),
        ["a", "<", ">", "/", "think", "é", "日", "👩‍👩‍👧", " ", "\n"],
    )
    for _ in range(100):
        thought, answer = ("".join(r.choices(alphabet, k=9)) for _ in range(2))
        if "</think>" in thought or not answer.strip():
            continue
        shown, inside = say(t, f"<think>{thought}</think>{answer}", form)
        assert (shown, inside) == (answer.lstrip(), thought)


def test_control_tokens_that_are_shown() -> None:
    t = tokens(["<|python_tag|>", "<|eom_id|>", "[TOOL_CALLS]", "[ARGS]"])
    said = 'ü<|python_tag|>{"a": 1}<|eom_id|>[TOOL_CALLS]f[ARGS]{}'
    for shown in (("<|python_tag|>",), ("[TOOL_CALLS]", "[ARGS]"), ("<|missing|>",), ()):
        stream = Stream(t, (), PLAIN, shown)
        text = "".join(stream.push(i) for i in t.encode(said, special=True)) + stream.finish()
        wanted = said
        for name in ("<|python_tag|>", "<|eom_id|>", "[TOOL_CALLS]", "[ARGS]"):
            wanted = wanted if name in shown else wanted.replace(name, "")
        assert text == wanted


@pytest.mark.parametrize("said", [s for s, _ in HARMONY if "to=" in s])
def test_a_call_shows_its_header_in_one_form(said: str) -> None:
    t = tokens(MARKERS)
    form = format_of(t, None)
    if not said.startswith("<|"):
        form = form.after(t, t.encode("<|start|>assistant", special=True))
    stream = Stream(t, (), form, ("<|channel|>",))
    text = "".join(stream.push(i) for i in t.encode(said, special=True)) + stream.finish()
    assert text == '<|channel|>commentary to=functions.add<|message|>{"a": 1}'


def test_a_call_in_the_reasoning_stays_there() -> None:
    t = tokens(plain=["<think>", "</think>", "<tool_call>", "</tool_call>"])
    said = "<think>I could <tool_call>{}</tool_call> so</think>Yes."
    assert say(t, said, format_of(t, None)) == ("Yes.", "I could <tool_call>{}</tool_call> so")


@given(
    st.lists(st.sampled_from(["a", "b", "#", "<", "call>", "<call>", "##"]), max_size=12),
    st.randoms(),
)
def test_stop_strings_are_not_looked_for_in_calls(parts: list[str], random: random.Random) -> None:
    text, stops = "".join(parts), ("##", "b<")
    cut, out, left = Stops(stops, ("<call>",)), "", text
    while left:
        size = random.randint(1, len(left))
        out, left = out + cut.cut(left[:size], False), left[size:]
    out += cut.cut("", True)
    free, mark, _ = text.partition("<call>")
    found = [at for s in stops if (at := (free + mark).find(s)) >= 0]
    begun = [at for at in found if at <= len(free) - 1]
    assert out == (text[: min(begun)] if begun else text)
    assert cut.stopped == bool(begun)
