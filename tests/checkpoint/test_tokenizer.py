"""Tokenizers built from GGUF arrays equal transformers' on a text that is hard to get right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from outsize.checkpoint import tokenizer as ours
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.errors import CheckpointError, UnsupportedError

HARD = (
    "def f(x_1):\n\treturn x**2  # code\r\n\r\n   trailing   \n\n\n"
    "I'll, WE'VE, don't 1234567 3.14 ١٢٣ e\u0301 \u00e9 naïve ﬁ "
    "🙂👩‍👩‍👧‍👦🇯🇵 日本語、中文字符 한국어 العربية עברית ไทย \u200b\u200d\ufeff\x00\x01\x1b\x7f "
    "a\u00a0b\u3000c\u2028d " + " " * 37 + "x" + "\t" * 9 + "y" + "\n" * 12 + "<|im_end|> <s> </s>"
)


def trained(pre: pre_tokenizers.PreTokenizer) -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([HARD * 3, "the quick brown fox don't we'll 1234 " * 20], trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def spec(tokens: list[str], merges: list[str], pre: str) -> TokenizerSpec:
    types = np.array([1] * len(tokens) + [3])
    arrays = {"model": "gpt2", "pre": pre, "tokens": [*tokens, "<|im_end|>"], "merges": merges}
    return TokenizerSpec(arrays=arrays | {"token_type": types})


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
@pytest.mark.filterwarnings("ignore")
def test_byte_level_equals_transformers(pre: str, name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    built = ours.build(spec(tokens, merges, pre))
    vocab = {t: i for i, t in enumerate(tokens)} | {"<|im_end|>": len(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    expected = theirs.encode(HARD, add_special_tokens=False)
    ids = built.encode(HARD, add_special_tokens=False).ids
    assert ids == expected


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_byte_level_round_trip(pre: str) -> None:
    import unicodedata

    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    built = ours.build(spec(tokens, merges, pre))
    ids = built.encode(HARD, add_special_tokens=False).ids
    wanted = unicodedata.normalize("NFC", HARD) if pre == "qwen2" else HARD
    assert built.decode(ids, skip_special_tokens=False) == wanted
    assert ours.from_json(built.to_str()).encode(HARD, add_special_tokens=False).ids == ids


def test_pre_tokenizers_split_digits_their_own_way() -> None:
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokens, merges = [*tokens, "12", "123", "1234"], ["1 2", "12 3", "123 4", *merges]
    tokens = list(dict.fromkeys(tokens))
    counts = {
        pre: len(ours.build(spec(tokens, merges, pre)).encode("1234").ids)
        for pre in ("gpt-2", "llama-bpe", "qwen2", "smollm")
    }
    assert counts == {"gpt-2": 1, "llama-bpe": 2, "qwen2": 4, "smollm": 4}


def pieces() -> tuple[list[str], np.ndarray, np.ndarray]:
    """A SentencePiece-like vocabulary: specials, bytes, pieces with falling scores."""
    words = ["▁", "t", "h", "e", "a", "n", "th", "▁th", "the", "▁the", "an", "▁a", "▁an", "he"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + words
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    return tokens, np.array(types), np.array(scores, np.float32)


def sentencepiece(prefix: bool) -> Tokenizer:
    tokens, types, scores = pieces()
    arrays = {
        "model": "llama", "tokens": tokens, "token_type": types, "scores": scores,
        "unknown_token_id": 0, "add_space_prefix": prefix,
    }  # fmt: skip
    return ours.build(TokenizerSpec(arrays=arrays))


def test_sentencepiece_merges_best_score_first() -> None:
    tokens = pieces()[0]
    ids = sentencepiece(True).encode("the an then", add_special_tokens=False).ids
    assert [tokens[i] for i in ids] == ["▁the", "▁an", "▁the", "n"]


def test_sentencepiece_falls_back_to_bytes_and_back() -> None:
    for prefix in (True, False):
        built = sentencepiece(prefix)
        text = "the 🙂 an\té"
        assert built.decode(built.encode(text, add_special_tokens=False).ids) == text


USER_DEFINED = ["\n\n", "  ", "   ", "<table>", "he the", "▁▁▁▁"]


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (False, "the  an\n\nthe", ["the", "  ", "an", "\n\n", "the"]),
        (False, " <table>the he the", ["▁", "<table>", "the", "▁", "he the"]),
        (False, "the    an", ["the", "   ", "▁an"]),
        (False, "a\n\n\nthe", ["a", "\n\n", "<0x0A>", "the"]),
        (False, "</s>the<unk>an", ["</s>", "the", "<unk>", "an"]),
        (False, "an▁▁▁▁the", ["an", "▁▁▁▁", "the"]),
        (True, "the  an\n\nthe", ["▁the", "  ", "▁an", "\n\n", "▁the"]),
        (True, " <table>the he the", ["▁", "▁", "<table>", "▁the", "▁", "he the"]),
        (True, "the<table>an the", ["▁the", "<table>", "▁an", "▁the"]),
    ],
)
def test_user_defined_pieces_are_found_in_text(
    prefix: bool, text: str, expected: list[str]
) -> None:
    """What llama.cpp says for the same vocabulary."""
    tokens, types, scores = pieces()
    more = len(USER_DEFINED)
    tokens += USER_DEFINED
    arrays = {
        "model": "llama", "tokens": tokens, "unknown_token_id": 0, "add_space_prefix": prefix,
        "token_type": np.append(types, [4] * more),
        "scores": np.append(scores, [-1000.0] * more),
    }  # fmt: skip
    spec = TokenizerSpec(arrays=arrays)
    for built in (ours.build(spec), ours.lean(ours.build(spec).to_str())):
        ids = built.encode(text, add_special_tokens=False).ids
        assert [tokens[i] for i in ids] == expected


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"model": "bert"}, UnsupportedError, "'bert' is not known"),
        ({"pre": "falcon-h1"}, UnsupportedError, "pre-tokenizer 'falcon-h1'"),
        ({"tokens": 5}, CheckpointError, "not a list of strings"),
        ({"merges": ["a zz9"]}, CheckpointError, "joins pieces not in the vocabulary"),
        ({"token_type": np.array([1])}, CheckpointError, "not a list of"),
    ],
)
def test_bad_tokenizers(change: dict[str, object], error: type[Exception], problem: str) -> None:
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    base = spec(tokens, merges, "gpt-2")
    for refuse in (ours.build, ours.check):
        with pytest.raises(error, match=problem):
            refuse(TokenizerSpec(arrays=dict(base.arrays) | change))


def test_doubles_and_empty_pieces() -> None:
    base = dict(spec(["a", "b", "ab", "", ""], ["a b", "b a", "a b"], "gpt-2").arrays)
    with pytest.raises(CheckpointError, match="merge 'b a' joins pieces not in"):
        ours.check(TokenizerSpec(arrays=base))
    base["merges"] = ["a b", "a b"]
    built = ours.lean(ours.build(TokenizerSpec(arrays=base)).to_str())
    named = [built.id_to_token(i) for i in range(6)]
    assert named == ["a", "b", "ab", "[EMPTY_3]", "[EMPTY_4]", "<|im_end|>"]
    assert built.encode("ab<|im_end|>").ids == [2, 5]
    base["tokens"] = ["a", "b", "ab", "b", "", "<|im_end|>"]
    for refuse in (ours.build, ours.check):
        with pytest.raises(CheckpointError, match="'b' twice, as 1 and 3"):
            refuse(TokenizerSpec(arrays=base))


def test_hostile_lengths_are_refused_before_the_work() -> None:
    tokens = ["<unk>", *("a" * n for n in (1, 2, 1 << 20))]
    arrays = {
        "model": "llama", "tokens": tokens, "scores": np.zeros(4), "token_type": np.array([2, 1, 1, 1])
    }  # fmt: skip
    for refuse in (ours.build, ours.check):
        with pytest.raises(CheckpointError, match="pieces of up to 1,048,576 characters"):
            refuse(TokenizerSpec(arrays=arrays))


def test_bad_json() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not usable"):
        ours.from_json('{"model": 5}')


def added(id: int, content: str, **flags: bool) -> dict[str, object]:
    known = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": True} | known | flags


def bare_json(*tokens: dict[str, object], **parts: object) -> str:
    """A tokenizer.json of the pieces a, b and c (0 to 2) with these added tokens."""
    whole = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, [])).to_str())
    return json.dumps(whole | {"added_tokens": list(tokens)} | parts)


@pytest.mark.parametrize(
    "tokens",
    [
        [added(3, "<s>"), added(5, "</s>")],  # a hole
        [added(4, "</s>"), added(3, "<s>")],  # disorder
        [added(3, "<s>"), added(4, "<s>")],  # a double
        [added(3, "<s>"), added(0, "b")],  # a piece under another id
    ],
)
def test_an_id_that_would_change_is_refused(tokens: list[dict[str, object]]) -> None:
    text = bare_json(*tokens)
    for refuse in (ours.build, ours.check):
        with pytest.raises(
            CheckpointError, match=r"added token '.*' is stated as \d but would be read as"
        ):
            refuse(TokenizerSpec(json=text))


@given(
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from("abcdxyz")), max_size=5),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), max_size=4),
)
def test_check_refuses_what_build_refuses(
    tokens: list[tuple[int, str]], vocab: dict[str, int]
) -> None:
    model = json.loads(Tokenizer(models.BPE(vocab, [])).to_str())["model"]
    text = bare_json(*(added(i, c) for i, c in tokens), model=model)

    def refused(call: Callable[[TokenizerSpec], object]) -> str:
        try:
            call(TokenizerSpec(json=text))
        except CheckpointError as e:
            return str(e)
        return ""

    assert refused(ours.check) == refused(ours.build)


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("[]", CheckpointError, "has no 'model'"),
        ("{" * 50_000, CheckpointError, "is not usable"),
        (bare_json(model={"type": "Morse"}), UnsupportedError, "model 'Morse' is not known"),
        (bare_json(model={"type": "BPE", "vocab": 5}), CheckpointError, "is not usable"),
        (bare_json(added_tokens=5), CheckpointError, "'added_tokens' is not a list"),
        (bare_json({"id": "x"}), CheckpointError, "has no id, no content or no true or false"),
        (bare_json({"id": 3, "content": "x"}), CheckpointError, "missing field"),
        (bare_json(normalizer={"type": "Shout"}), CheckpointError, "is not usable"),
    ],
)
def test_bad_tokenizer_json(text: str, error: type[Exception], problem: str) -> None:
    for refuse in (ours.build, ours.check):
        with pytest.raises(error, match=problem):
            refuse(TokenizerSpec(json=text))


def test_added_tokens_keep_their_flags() -> None:
    flags = {
        "single_word": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
        "special": False,
    }
    tokens = [
        added(3, "<s>"),
        *(added(4 + i, f"<{k}>", **{k: v}) for i, (k, v) in enumerate(flags.items())),
    ]
    built = ours.lean(ours.from_json(bare_json(*tokens)).to_str())
    assert json.loads(built.to_str())["added_tokens"] == tokens


def test_the_config_beside_overrides_flags_and_adds_tokens() -> None:
    """As in transformers; there a new token is counted on, here it is refused if that is not its id."""
    text = bare_json(added(3, "<s>"), added(4, "<tool>", special=False))
    config = {"4": added(4, "<tool>", lstrip=True), "5": {"content": "<new>", "special": True}}
    del config["4"]["id"]
    built = ours.lean(ours.build(TokenizerSpec(json=text, added_tokens=config)).to_str())
    expected = [added(3, "<s>"), added(4, "<tool>", lstrip=True), added(5, "<new>")]
    assert json.loads(built.to_str())["added_tokens"] == expected
    for refuse in (ours.build, ours.check):
        with pytest.raises(CheckpointError, match="'<new>' is stated as 9 but would be read as 5"):
            refuse(TokenizerSpec(json=text, added_tokens={"9": added(9, "<new>")}))
        with pytest.raises(CheckpointError, match="'x' of tokenizer_config"):
            refuse(TokenizerSpec(json=text, added_tokens={"x": added(9, "<new>")}))
    ours.check(TokenizerSpec(json=text, added_tokens={"9": added(9, "<tool>")}))


def test_nothing_is_cut_off_or_filled_up() -> None:
    made = Tokenizer.from_str(bare_json())
    made.enable_truncation(max_length=4)
    made.enable_padding(length=8, pad_id=2, pad_token="c")
    for text in ("ab", "ab" * 50):
        built = ours.lean(ours.from_json(made.to_str()).to_str())
        assert len(built.encode(text).ids) == len(text)


def test_a_damaged_pack_feeds_no_wrong_id() -> None:
    text = ours.from_json(bare_json(added(3, "<s>"))).to_str()
    with pytest.raises(CheckpointError, match="stated as 7 but would be read as 3"):
        ours.lean(text.replace('"id":3', '"id":7'))
