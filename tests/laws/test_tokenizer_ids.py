"""A pack's tokenizer is the checkpoint's: every id, every split, every kind of tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)  # fmt: skip

from outsize.checkpoint import gguf, pretokenizers
from outsize.checkpoint import tokenizer as ours
from outsize.checkpoint.checkpoint import TokenizerSpec
from tests.checkpoint.test_tokenizer import HARD, trained

MODELS = os.environ.get("OUTSIZE_MODELS")  # the fixture of the home takes such names away
MARKED = " a<|s|>b <tool> c<s>  d\n\n\n<table>e</s><|im_end|>\t<unk>"
TEXT = HARD + MARKED
SPECIAL = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<|s|>")]
PLAIN = [
    AddedToken("<tool>", normalized=False),
    AddedToken("<table>", normalized=False, lstrip=True, rstrip=True),
    AddedToken("naïve", normalized=True, single_word=True),
]


def packed(spec: TokenizerSpec) -> Tokenizer:
    ours.check(spec)
    return ours.lean(ours.build(spec).to_str())


# --- GGUF ----------------------------------------------------------------------------------------------

BYTES = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def byte_level(pre: str) -> TokenizerSpec:
    pieces, merges = BYTES
    tokens = ["<unk>", *pieces, "<s>", "</s>", "<|s|>", "<tool>", "<table>", "[PAD606]", "\n\n"]
    types = np.array([2] + [1] * len(pieces) + [3, 3, 3, 4, 4, 5, 4])
    return TokenizerSpec(
        arrays={
            "model": "gpt2",
            "pre": pre,
            "tokens": tokens,
            "token_type": types,
            "merges": merges,
        }
    )


def of_gemma4() -> TokenizerSpec:
    """As Gemma 4's: pieces of characters with ▁ for a space, merges stated, bytes for what no piece has."""
    text = HARD.replace(" ", "▁").replace("\0", "")
    words = [text[i : i + n] for n in (2, 4) for i in range(0, len(text) - n, n)]
    words = list(dict.fromkeys(w for w in words if "\n" not in w))
    chars = [*sorted(set("".join(words)))[::2], "▁", "\n", "\n\n"]
    known = set(chars)
    merges = [(w[: len(w) // 2], w[len(w) // 2 :]) for w in sorted(words, key=len)]
    kept = list[str]()
    for left, right in [*merges, ("\n", "\n")]:
        if left in known and right in known:
            known.add(left + right)
            kept.append(f"{left} {right}")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<tool>", "<s>", "</s>", "<|s|>", "<table>"]
    fixed = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    tokens = [*fixed, *sorted(known - {*fixed})]
    types = [3, 3, 3, 2, 4, 3, 3, 3, 4] + [6] * 256 + [1] * (len(tokens) - len(fixed))
    arrays = {
        "model": "gemma4", "tokens": tokens, "token_type": np.array(types), "merges": kept,
        "unknown_token_id": 3, "add_space_prefix": False, "scores": np.zeros(len(tokens), np.float32),
    }  # fmt: skip
    return TokenizerSpec(arrays=arrays)


def test_gemma4_is_as_transformers_has_it() -> None:
    """The same pieces and merges as the model's tokenizer.json states them: in its normalizer, its cut at
    spaces (of which none are left) and its decoder as Gemma's converter in transformers makes them."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    spec = of_gemma4()
    tokens = list(spec.arrays["tokens"])  # type: ignore[call-overload]
    merges = [tuple(m.split(" ")) for m in spec.arrays["merges"]]  # type: ignore[attr-defined]
    theirs = transformers.GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    built = packed(spec)
    for text in (HARD, TEXT, " a  b\n\n\nc ", "🙂 é\n ▁x", ""):
        text = text.replace("\0", "")
        for kind in ("<tool>", "<table>", "<s>", "</s>", "<|s|>", "<unk>", "<|im_end|>"):
            text = text.replace(kind, "")
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert built.encode(text, add_special_tokens=False).ids == ids
        assert built.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def scored(prefix: bool) -> TokenizerSpec:
    """SentencePiece-style with pieces of the text, Gemma's kinds of user-defined ones among them."""
    text = HARD.replace(" ", "▁").replace("\n", "").replace("\0", "")
    words = [text[i : i + n] for n in (2, 3, 4, 6) for i in range(0, len(text), n)]
    user = ["\n", "\n\n", "\n\n\n", "  ", "   ", "<table>", "<tool>"]
    special = ["<unk>", "<s>", "</s>", "<|s|>"]
    fixed = [*special, *(f"<0x{i:02X}>" for i in range(256)), *user]
    tokens = list(dict.fromkeys([*fixed, *words, *sorted(set(text))]))
    types = [2, 3, 3, 3] + [6] * 256 + [4] * len(user) + [1] * (len(tokens) - len(fixed))
    scores = [-float(max(0, i - len(fixed))) for i in range(len(tokens))]
    arrays = {
        "model": "llama", "tokens": tokens, "token_type": np.array(types), "unknown_token_id": 0,
        "scores": np.array(scores, np.float32), "add_space_prefix": prefix,
    }  # fmt: skip
    return TokenizerSpec(arrays=arrays)


@pytest.mark.parametrize(
    "spec", [*map(byte_level, pretokenizers.KNOWN), scored(True), scored(False), of_gemma4()]
)
def test_a_gguf_keeps_every_id(spec: TokenizerSpec) -> None:
    tokens = spec.arrays["tokens"]
    assert isinstance(tokens, list)
    same(packed(spec), ours.build(spec), tokens)


def same(lean: Tokenizer, whole: Tokenizer, tokens: list[str | None]) -> None:
    assert [lean.id_to_token(i) for i in range(len(tokens))] == tokens
    assert lean.id_to_token(len(tokens)) is None
    ids = whole.encode(TEXT, add_special_tokens=False).ids
    assert lean.encode(TEXT, add_special_tokens=False).ids == ids
    for skip in (True, False):
        assert lean.decode(ids, skip_special_tokens=skip) == whole.decode(
            ids, skip_special_tokens=skip
        )
    assert parts(lean) == parts(whole)


def parts(tokenizer: Tokenizer) -> dict[str, object]:
    """All but the model."""
    whole: dict[str, object] = json.loads(tokenizer.to_str())
    del whole["model"]
    return whole


# --- tokenizer.json ------------------------------------------------------------------------------------


def learned(model: models.Model, trainer: trainers.Trainer, *parts: object) -> Tokenizer:
    made = Tokenizer(model)
    for part in parts:
        if isinstance(part, normalizers.Normalizer):
            made.normalizer = part
        elif isinstance(part, pre_tokenizers.PreTokenizer):
            made.pre_tokenizer = part
        else:
            made.decoder = part
    made.train_from_iterator([HARD * 2, "the quick brown fox " * 20], trainer)
    return made


def bytes_json() -> Tokenizer:
    """As Llama 3: special tokens after the vocabulary, and a start token put by the post-processor."""
    pieces, merges = BYTES
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    made = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    made.pre_tokenizer = pretokenizers.KNOWN["llama-bpe"].build()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", len(pieces))]
    )
    return made


FALLBACK = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]


def fallback_json(*parts: object) -> Tokenizer:
    """As Llama 2 and Gemma: pieces, and bytes for what is in none."""
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=FALLBACK, limit_alphabet=60)
    whole = json.loads(learned(models.BPE(), trainer, *parts).to_str())
    whole["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    whole["added_tokens"] = whole["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(whole))


def metaspace_json() -> Tokenizer:
    first = {"replacement": "▁", "prepend_scheme": "first"}
    return fallback_json(
        pre_tokenizers.Metaspace(**first, split=False),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**first)]),
    )


def replace_json(*before: normalizers.Normalizer) -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return fallback_json(
        normalizers.Sequence([*before, normalizers.Replace(" ", "▁")]),
        pre_tokenizers.Split(Regex("▁+"), "merged_with_next"),
        decoders.Sequence(steps),
    )


def unigram_json() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    return learned(
        models.Unigram(),
        trainer,
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )


def wordpiece_json() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>"], show_progress=False
    )
    model = models.WordPiece(unk_token="<unk>")
    return learned(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())


def wordlevel_json() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    return learned(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.WhitespaceSplit())


JSONS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": bytes_json,
    "metaspace": metaspace_json,
    "replace": replace_json,
    "prepend": lambda: replace_json(normalizers.Prepend("▁")),
    "unigram": unigram_json,
    "wordpiece": wordpiece_json,
    "wordlevel": wordlevel_json,
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_json_keeps_every_id(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = JSONS[kind]()
    made.add_special_tokens(SPECIAL)
    made.add_tokens(PLAIN)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    lean = packed(TokenizerSpec(json=path.read_text()))
    same(lean, made, [made.id_to_token(i) for i in range(made.get_vocab_size())])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), clean_up_tokenization_spaces=False
    )
    ids = theirs.encode(TEXT, add_special_tokens=False)
    assert lean.encode(TEXT, add_special_tokens=False).ids == ids
    assert theirs.convert_ids_to_tokens(range(len(theirs))) == [
        lean.id_to_token(i) for i in range(len(theirs))
    ]
    for skip in (True, False):
        assert lean.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


# --- full size -----------------------------------------------------------------------------------------


def test_a_vocabulary_of_full_size_keeps_every_id() -> None:
    """Qwen's shape: 151,643 pieces, 22 tokens after them, and fillers up to 151,936."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    twos = [(a, b) for a in letters for b in letters]
    threes = [(a + b, c) for a, b in twos[:400] for c in letters]
    merges = [*twos, *threes][: 151_643 - 256]
    tokens = [*letters, *(a + b for a, b in merges)]
    special = [f"<|special_{i}|>" for i in range(20)] + ["<tool_call>", "</tool_call>"]
    fill = [f"[PAD{i}]" for i in range(len(tokens) + 22, 151_936)]
    types = np.array([1] * len(tokens) + [3] * 20 + [4] * 2 + [5] * len(fill))
    spec = TokenizerSpec(
        arrays={
            "model": "gpt2", "pre": "qwen2", "tokens": [*tokens, *special, *fill], "token_type": types,
            "merges": [f"{a} {b}" for a, b in merges],
        }
    )  # fmt: skip
    whole = ours.build(spec)
    lean = ours.lean(whole.to_str())
    listed = [*tokens, *special, *fill]
    assert len(listed) == 151_936
    assert [lean.id_to_token(i) for i in range(len(listed))] == listed
    text = HARD + "".join(special)
    ids = whole.encode(text, add_special_tokens=False).ids
    assert lean.encode(text, add_special_tokens=False).ids == ids
    assert ids[-22:] == list(range(151_643, 151_665))


# --- the real ones -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_models_keep_every_id() -> None:
    if not MODELS:
        pytest.skip("OUTSIZE_MODELS names no folder of GGUF files")
    paths = sorted(Path(MODELS).glob("*.gguf"))
    assert paths, f"no GGUF in {MODELS}"
    for path in paths:
        spec = gguf.load(path).tokenizer
        tokens = spec.arrays["tokens"]
        assert isinstance(tokens, list)
        same(packed(spec), ours.build(spec), tokens)
