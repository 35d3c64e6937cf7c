"""Sampling, streaming text, chat templates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outsize.errors import OptionError, TemplateError
from outsize.options import Options, parse_size
from outsize.sampling.sample import Sampler, keep_min_p, keep_top_k, keep_top_p, penalize
from outsize.text.detokenize import Stream
from outsize.text.template import render
from outsize.text.tokens import Tokens
from tests.golden import tiny

TEXT = "déjà vu — 日本語 🙂👩‍👩‍👧 العربية\n\tend"


def tokens() -> Tokens:
    return Tokens(tiny.tokenizer(), 256, False)


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(Options(), 0)(torch.tensor([1.0, 3.0, 3.0]), [0]) == 1


def test_filters() -> None:
    prob = np.array([0.5, 0.3, 0.15, 0.05])
    assert len(keep_top_k(prob, 2)) == 2
    assert len(keep_top_k(prob, 0)) == 4
    assert len(keep_top_p(prob, 0.79)) == 2
    assert len(keep_top_p(prob, 0.81)) == 3
    assert len(keep_top_p(prob, 0.0)) == 1
    assert len(keep_top_p(prob, 1.0)) == 4
    assert len(keep_min_p(prob, 0.3)) == 3


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    options = Options(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0)
    pick = Sampler(options, 1)
    counts = np.bincount([pick(logits, [0]) for _ in range(20_000)], minlength=4) / 20_000
    # 20,000 draws: a standard error of at most 0.0036.
    np.testing.assert_allclose(counts, torch.softmax(logits / 0.7, 0), atol=0.015)


def test_top_k_one_is_greedy_at_any_temperature() -> None:
    pick = Sampler(Options(temperature=5.0, top_k=1), 3)
    assert {pick(torch.tensor([0.0, 9.0, 1.0]), [0]) for _ in range(50)} == {1}


def test_penalty_reaches_only_recent_tokens() -> None:
    logits = torch.tensor([4.0, -2.0, 1.0])
    options = Options(repeat_penalty=2.0)
    assert penalize(logits, [0, 1], options).tolist() == [2.0, -4.0, 1.0]
    assert penalize(logits, [0] + [2] * 64, options).tolist() == [4.0, -2.0, 0.5]
    assert penalize(logits, [0] + [2] * 64, Options(repeat_penalty=2.0, repeat_last_n=-1)).tolist() == [
        2.0, -2.0, 0.5,
    ]  # fmt: skip


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = torch.tensor([4.0, -2.0, 1.0])
    options = Options(presence_penalty=1.0, frequency_penalty=0.5)
    assert penalize(logits, [0, 0, 1], options).tolist() == [2.0, -3.5, 1.0]
    assert penalize(logits, [], options).tolist() == logits.tolist()
    assert penalize(logits, [0], Options(presence_penalty=1.0, repeat_last_n=0)).tolist() == [
        4,
        -2,
        1,
    ]


def test_a_bias_decides_and_logprobs_are_of_the_model_itself() -> None:
    logits = torch.tensor([4.0, -2.0, 1.0])
    pick = Sampler(Options(logit_bias={2: 50.0}, logprobs=2), 0)
    assert pick(logits, [0]) == 2
    (seen,) = pick.logprobs
    assert seen.token == 2
    assert [token for token, _ in seen.top] == [0, 2]
    assert seen.logprob == pytest.approx(float(logits.log_softmax(0)[2]))
    with pytest.raises(OptionError, match="token 7"):
        Sampler(Options(logit_bias={7: 1.0}), 0)(logits, [0])


def test_streaming_never_emits_half_a_character() -> None:
    t = tokens()
    stream, out = Stream(t, ()), []
    for token in t.encode(TEXT, start=False):
        out.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in out[-1]
    assert "".join(out) + stream.finish() == TEXT


def test_a_character_that_never_ends_is_dropped() -> None:
    t = tokens()
    stream = Stream(t, ())
    pieces = [stream.push(i) for i in t.encode("ok 🙂", start=False)[:-1]]
    assert "".join(pieces) + stream.finish() == "ok "


def test_stop_strings_cut_and_are_never_half_shown() -> None:
    t = tokens()
    for stop, expected in (
        ("world", "hello worl, hello "),
        ("o w", "hell"),
        ("xyz", "hello worl, hello world!"),
    ):
        stream, out = Stream(t, (stop,)), ""
        for token in t.encode("hello worl, hello world!", start=False):
            out += stream.push(token)
            assert expected.startswith(out)
        out += stream.finish()
        assert out == expected
        assert stream.stopped == (stop != "xyz")


def test_sentencepiece_spaces_survive_streaming() -> None:
    vocab = {"▁a": 0, "▁b": 1, "c": 2}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    stream = Stream(Tokens(made, None, False), ())
    assert "".join(stream.push(i) for i in (0, 1, 2, 0)) == "a bc a"


def test_start_token_once() -> None:
    t = Tokens(tiny.tokenizer(), 256, True)
    assert t.encode("a", start=True)[0] == 256
    assert t.encode("<s>a", start=True).count(256) == 1
    assert 256 not in t.encode("a", start=False)


def test_template() -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "yo"}]]
    assert render(tiny.TEMPLATE, chats, {})[1] == "<s>user: yo\n<s>assistant: "


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ().__class__.__bases__ }}", "SecurityError"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer|status",
        ),
        ("{{ 'x' * 10 ** 10 }}", "memory|Memory"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_hostile_templates(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outsize.text.template.TIME_LIMIT_S", 2)
    with pytest.raises(TemplateError, match=problem):
        render(template, [[{"role": "user", "content": "hi"}]], {})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"top_p": 1.5}, "from 0.0 to 1.0"),
        ({"max_tokens": 0}, "from 1 to"),
        ({"max_tokens": True}, "whole number"),
        ({"seed": -1}, "from 0 to"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"stop": 5}, "a string or a list"),
    ],
)
def test_bad_options(change: dict[str, object], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        Options().with_changes(change)


def test_sizes() -> None:
    sizes = {"900MB": 900_000_000, "4GB": 4 * 10**9, "1.5GiB": 3 << 29, "12": 12, " 2 k ": 2000}
    for text, size in sizes.items():
        assert parse_size(text) == size
    with pytest.raises(OptionError, match="900MB or 4GB"):
        parse_size("many")
