"""Tokenizers, built directly from the arrays of a GGUF, or taken from a tokenizer.json.

Three kinds: byte-level BPE, which states its merges and names its pre-tokenizer; SentencePiece-style BPE,
which states a score for each piece: there a merge exists wherever two pieces join into a third, and the
joined piece's score is the merge's rank; and Gemma 4's, which is of this style and states its merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from outsize.checkpoint import pretokenizers, tokenizer_json
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.checkpoint.pretokenizers import PreTokenizer
from outsize.errors import CheckpointError, UnsupportedError

BYTES, SCORED, MERGED = "gpt2", "llama", "gemma4"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MARKED = (UNKNOWN, CONTROL, USER_DEFINED)  # pieces that are found in a text as it stands
JOINED = (NORMAL, USER_DEFINED)  # pieces that merges make and join
# While pieces are cut in two, wherever they can be: characters looked at (Gemma's need 11 million), and cuts.
MAX_JOINS, MAX_CUTS = 1 << 25, 1 << 21


def build(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError or UnsupportedError."""
    if spec.json is not None:
        return from_json(spec.json, spec.added_tokens)
    tokens, types = _pieces(spec.arrays)
    if spec.arrays["model"] == BYTES:
        tokenizer = _byte_bpe(spec.arrays, tokens)
    elif spec.arrays["model"] == SCORED:
        tokenizer = _sentencepiece(spec.arrays, tokens, types)
    else:
        tokenizer = _merged(spec.arrays, tokens)
    _add_special(tokenizer, tokens, types)
    return tokenizer


def check(spec: TokenizerSpec) -> None:
    """Refuses what `build` would refuse, without the time and memory of building. Raises
    CheckpointError or UnsupportedError."""
    if spec.json is not None:
        tokenizer_json.check(spec.json, spec.added_tokens)
        return
    tokens, types = _pieces(spec.arrays)
    if spec.arrays["model"] != SCORED:
        if spec.arrays["model"] == BYTES:
            _pre(spec.arrays)
        _merges(spec.arrays, _vocab(tokens))
    else:
        _scores(spec.arrays, tokens, types)


def from_json(text: str | bytes, config: Mapping[str, object] | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which neither cuts nor pads; `config` is the
    `added_tokens_decoder` beside it. Raises CheckpointError, as where an added token would get another
    id than stated."""
    stated = tokenizer_json.added(tokenizer_json.parse(text))
    more = tokenizer_json.overrides(config or {}, stated)
    tokenizer = tokenizer_json.made(text)
    with tokenizer_json.refusing_panics(tokenizer_json.bad):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_tokens([a.token for a in more])
    tokenizer_json.compare([*stated, *more], tokenizer.token_to_id)
    return tokenizer


def _pieces(arrays: Mapping[str, object]) -> tuple[list[str], list[int]]:
    """The vocabulary with the kind of each piece. An empty piece gets a name, as in llama.cpp."""
    kind = arrays.get("model")
    if kind not in (BYTES, SCORED, MERGED):
        raise UnsupportedError(
            f"tokenizer model {kind!r} is not known; known are 'gpt2' (byte-level BPE), "
            "'llama' (SentencePiece-style) and 'gemma4'"
        )
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(_strings(arrays, "tokens"))]
    if len(tokens) > tokenizer_json.MAX_TOKENS:
        raise CheckpointError(
            f"'tokenizer.ggml.tokens' has {len(tokens):,} pieces, at most {tokenizer_json.MAX_TOKENS:,} "
            "are known; is the file sound?"
        )
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (first := seen.setdefault(token, i)) != i:
            raise CheckpointError(
                f"'tokenizer.ggml.tokens' has {token[:80]!r} twice, as {first} and {i}: one of the two could "
                "not be told from the other; convert the model again"
            )
    types = _numbers(arrays, "token_type", len(tokens))
    tokenizer_json.refuse_long_names(
        t for t, kind in zip(tokens, types, strict=True) if kind in MARKED
    )
    return tokens, types


def _strings(arrays: Mapping[str, object], key: str) -> list[str]:
    value = arrays.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"'tokenizer.ggml.{key}' is missing or not a list of strings")
    return cast("list[str]", value)


def _numbers(arrays: Mapping[str, object], key: str, length: int) -> list[int]:
    value = arrays.get(key, np.full(length, NORMAL))
    if not isinstance(value, np.ndarray) or value.shape != (length,):
        raise CheckpointError(f"'tokenizer.ggml.{key}' is not a list of {length:,} numbers")
    return cast("list[int]", value.tolist())


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _pre(arrays: Mapping[str, object]) -> PreTokenizer:
    return pretokenizers.find(arrays.get("pre", "default"))


def _merges(arrays: Mapping[str, object], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}  # of two alike the first counts
    for merge in _strings(arrays, "merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"tokenizer merge {merge[:80]!r} joins pieces not in the vocabulary"
            )
        merges[left, right] = None
    return list(merges)


def _byte_bpe(arrays: Mapping[str, object], tokens: list[str]) -> Tokenizer:
    pre, vocab = _pre(arrays), _vocab(tokens)
    merges = _merges(arrays, vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre.build()
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scores(arrays: Mapping[str, object], tokens: list[str], types: list[int]) -> list[int]:
    sizes = [len(t) for t, kind in zip(tokens, types, strict=True) if kind in JOINED]
    work = sum(size * size for size in sizes)
    if work > MAX_JOINS or sum(sizes) > MAX_CUTS:
        raise CheckpointError(
            f"'tokenizer.ggml.tokens' has pieces of up to {max(map(len, tokens)):,} characters, which "
            f"makes {work:,} characters to look at for {sum(sizes):,} cuts, over the limits of "
            f"{MAX_JOINS:,} and {MAX_CUTS:,}; is the file sound?"
        )
    return _numbers(arrays, "scores", len(tokens))


def _sentencepiece(arrays: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _scores(arrays, tokens, types)
    vocab = _vocab(tokens)
    merges = score_merges(tokens, types, scores, vocab)
    tokenizer = _with_fallback(arrays, tokens, merges)
    prefix = arrays.get("add_space_prefix", True) is True
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merged(arrays: Mapping[str, object], tokens: list[str]) -> Tokenizer:
    """Gemma 4's, whose merges are stated, and no space is put before a text. llama.cpp cuts texts at runs of
    newlines before; no merge of the model joins one with anything else."""
    tokenizer = _with_fallback(arrays, tokens, _merges(arrays, _vocab(tokens)))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _with_fallback(
    arrays: Mapping[str, object], tokens: list[str], merges: list[tuple[str, str]]
) -> Tokenizer:
    """BPE over characters; those that no piece has become their bytes' pieces."""
    unknown = arrays.get("unknown_token_id")
    name = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    model = models.BPE(_vocab(tokens), merges, unk_token=name, fuse_unk=True, byte_fallback=True)
    return Tokenizer(model)


def score_merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best joined piece first."""
    pieces = {t: t for t, kind in zip(tokens, types, strict=True) if kind in JOINED}
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    merges: list[tuple[str, str]] = []
    for i in order:
        token = tokens[i]
        if token not in pieces:
            continue
        found = [
            (left, right)
            for cut in range(1, len(token))
            if (left := pieces.get(token[:cut])) and (right := pieces.get(token[cut:]))
        ]
        if len(found) > 1:
            found.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += found
    return merges


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Marks the pieces that are found in a text as it stands, before it is cut into words or its spaces
    become ▁."""
    marked = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in MARKED
    ]
    tokenizer.add_tokens(marked)


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
    of the whole text beside what it builds. The pieces are handed over apart, and then the added
    tokens, which count on from them. Raises CheckpointError if one gets another id than it had."""
    whole = json.loads(text)
    model = whole["model"]
    if model.get("type") != "BPE":
        return from_json(text)
    del text
    stated = tokenizer_json.added(whole)
    whole["added_tokens"] = []
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
    tokenizer.add_tokens([a.token for a in sorted(stated, key=lambda a: a.id)])
    tokenizer_json.compare(stated, tokenizer.token_to_id)
    return tokenizer
