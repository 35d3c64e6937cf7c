"""Tokenizers built from GGUF arrays equal transformers' on a text that is hard to get right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from outsize.checkpoint import tokenizer as ours
from outsize.checkpoint.foreign import TokenizerSpec
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


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"model": "bert"}, UnsupportedError, "'bert' is not known"),
        ({"pre": "falcon"}, UnsupportedError, "pre-tokenizer 'falcon'"),
        ({"tokens": 5}, CheckpointError, "not a list of strings"),
        ({"merges": ["a zz9"]}, CheckpointError, "joins pieces not in the vocabulary"),
        ({"token_type": np.array([1])}, CheckpointError, "not a list of"),
    ],
)
def test_bad_tokenizers(change: dict[str, object], error: type[Exception], problem: str) -> None:
    tokens, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    base = spec(tokens, merges, "gpt-2")
    with pytest.raises(error, match=problem):
        ours.build(TokenizerSpec(arrays=dict(base.arrays) | change))


def test_bad_json() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not usable"):
        ours.from_json('{"model": 5}')
