"""Tokenizers, built directly from the arrays of a GGUF, or taken from a tokenizer.json.

Two kinds: byte-level BPE, which states its merges and names its pre-tokenizer, and SentencePiece-style
BPE, which states a score for each piece; there a merge exists wherever two pieces join into a third,
and the joined piece's score is the merge's rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from outsize.checkpoint import pretokenizers
from outsize.checkpoint.foreign import TokenizerSpec
from outsize.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def build(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError or UnsupportedError."""
    if spec.json is not None:
        return from_json(spec.json)
    arrays = spec.arrays
    kind = arrays.get("model")
    tokens = _strings(arrays, "tokens")
    types = _ints(arrays, "token_type", len(tokens))
    if kind == "gpt2":
        tokenizer = _byte_bpe(arrays, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(arrays, tokens, types)
    else:
        raise UnsupportedError(
            f"tokenizer model {kind!r} is not known; known are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece-style)"
        )
    _add_special(tokenizer, tokens, types, normalized=kind == "llama")
    return tokenizer


def from_json(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(
            f"tokenizer.json is not usable: {str(e)[:200]}; fetch it again"
        ) from None


def _strings(arrays: Mapping[str, object], key: str) -> list[str]:
    value = arrays.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"'tokenizer.ggml.{key}' is missing or not a list of strings")
    return cast("list[str]", value)


def _ints(arrays: Mapping[str, object], key: str, length: int) -> list[int]:
    value = arrays.get(key, np.full(length, NORMAL))
    if not isinstance(value, np.ndarray) or value.shape != (length,):
        raise CheckpointError(f"'tokenizer.ggml.{key}' is not a list of {length:,} numbers")
    return cast("list[int]", value.tolist())


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)
    return vocab


def _byte_bpe(arrays: Mapping[str, object], tokens: list[str]) -> Tokenizer:
    pre = pretokenizers.find(arrays.get("pre", "default"))
    vocab = _vocab(tokens)
    merges = []
    for merge in _strings(arrays, "merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(f"tokenizer merge {merge!r} joins pieces not in the vocabulary")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre.build()
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(arrays: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _ints(arrays, "scores", len(tokens))
    vocab = _vocab(tokens)
    merges = score_merges(tokens, types, scores, vocab)
    unknown = arrays.get("unknown_token_id")
    name = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=name, fuse_unk=True, byte_fallback=True)
    )
    prefix = arrays.get("add_space_prefix", True) is True
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def score_merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best joined piece first."""
    pieces = {t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    merges: list[tuple[str, str]] = []
    for i in order:
        token = tokens[i]
        if token not in pieces:
            continue
        found = [
            (left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in pieces and (right := token[cut:]) in pieces
        ]
        if len(found) > 1:
            found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += found
    return merges


def _add_special(
    tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], normalized: bool
) -> None:
    pairs = list(zip(tokens, types, strict=True))
    special = [AddedToken(t, special=True, normalized=False) for t, k in pairs if k == CONTROL]
    plain = [AddedToken(t, normalized=normalized) for t, k in pairs if k == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    if tokenizer.get_vocab_size() != len(set(tokens)):
        raise CheckpointError("tokenizer: special tokens are not in the vocabulary")


_BPE_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)


def lean(text: str) -> Tokenizer:
    """from_json for a text of our own making, in half of the memory: the library's reader keeps a tree
    of the whole text beside what it builds. The pieces are handed over apart."""
    whole = json.loads(text)
    model = whole["model"]
    if model.get("type") != "BPE":
        return Tokenizer.from_str(text)
    del text
    vocab, merges = model["vocab"], model["merges"]
    model["vocab"], model["merges"] = {}, []
    same = {piece: piece for piece in vocab}  # a merge's halves are pieces: one string each
    for i, pair in enumerate(merges):
        a, b = pair.split(" ", 1) if isinstance(pair, str) else pair
        merges[i] = same.get(a, a), same.get(b, b)
    del same
    options = {k: model[k] for k in _BPE_OPTIONS if model.get(k) is not None}
    made = models.BPE(vocab, merges, **options)
    del vocab, merges
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.model = made
    return tokenizer
