"""Start and end tokens, the names of special tokens and the chat templates, as a checkpoint's files state
them beside the tokenizer itself.

Every file that can name an end of text is asked, and all that they name end it: a fine-tune corrects one of
them and forgets the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from outsize.checkpoint import chat_templates, tokenizer_json
from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.checkpoint.file_names import MORE_TEMPLATES, SIDECARS
from outsize.checkpoint.pretokenizers import default_add_bos
from outsize.checkpoint.read_json import MAX_JSON, optional_json, parse_json
from outsize.errors import CheckpointError

MAX_ID = 1 << 31
GGUF_NAMES = {
    "bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "separator": "sep", "cls": "cls",
    "mask": "mask",
}  # fmt: skip
# Tokens that end a turn or a text whichever model has them. Files that name only the end of a document are
# common; llama.cpp goes by the texts, too.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|endoftext|>",
    "<|end_of_text|>", "<|eom_id|>", "<|return|>", "<|call|>", "<|eot|>", "<|EOT|>", "<EOT>",
    "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<turn|>", "<|turn_end|>",
    "<eos>", "<|tool_response>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token names and ids, and which of the ids stand for something other than a piece of text."""

    ids: Mapping[str, int]
    added: frozenset[int]

    def ends(self, named: Iterable[object]) -> tuple[int, ...]:
        """The ids among `named` (ids, lists of them, None), then those known by their text."""
        known = [self.ids[text] for text in ENDS if text in self.ids]
        if "<|return|>" in self.ids and "<|end|>" in self.ids:  # gpt-oss: ends a channel
            known.remove(self.ids["<|end|>"])
        return tuple(dict.fromkeys([*self._ids(named), *known]))

    def _ids(self, values: Iterable[object]) -> Iterator[int]:
        for value in values:
            if isinstance(value, list | tuple):
                yield from self._ids(value)
            elif isinstance(value, np.ndarray):
                yield from self._ids(value.ravel().tolist())
            elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID:
                yield value

    def named(self, name: object) -> int | None:
        """The id of a token's name."""
        return self.ids.get(name) if isinstance(name, str) else None

    def first(self, named: Iterable[object]) -> int | None:
        """The first of them that there is."""
        return next(self._ids(named), None)


# --- folders --------------------------------------------------------------------------------------


def of_folder(folder: Path, config: Mapping[str, object]) -> TokenizerSpec:
    """The tokenizer of a folder as the hub has them. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json in this folder; save it with the tokenizer's "
            "save_pretrained (fast tokenizer)"
        )
    raw = read_regular(path, MAX_JSON)
    tokenizer = parse_json(path, tokenizer_json.without_merges(raw))
    settings, generation = (
        optional_json(folder / f"{n}_config.json") for n in ("tokenizer", "generation")
    )
    more = _further(folder, settings, _vocabulary(tokenizer, {}))
    vocabulary = _vocabulary(tokenizer, more)
    inner = config.get("text_config")
    sources = [generation, config, *([inner] if isinstance(inner, dict) else [])]
    names = _names(folder, settings)
    leading = _leading(tokenizer, vocabulary)
    ids = [s.get("bos_token_id") for s in sources]
    bos = vocabulary.first([leading, vocabulary.named(names.get("bos_token")), *ids])
    ids = [s.get("eos_token_id") for s in sources]
    every = vocabulary.ends([vocabulary.named(names.get("eos_token")), *ids])
    # An ordinary piece of text is the default of a config's class, where others are named.
    ends = tuple(i for i in every if i in vocabulary.added) or every
    by_id = {i: text for text, i in vocabulary.ids.items()}
    for key, token in (("bos_token", bos), ("eos_token", ends[0] if ends else None)):
        if key not in settings and token is not None and token in by_id:
            names.setdefault(key, by_id[token])
    return TokenizerSpec(
        json=raw,
        bos=bos,
        eos=ends,
        add_bos=leading is not None
        or (settings.get("add_bos_token") is True and tokenizer.get("post_processor") is None),
        names=names,
        templates=chat_templates.of_folder(folder, settings),
        added_tokens=more,
    )


def sidecars(folder: Path) -> tuple[Path, ...]:
    """The files of a folder, beside its weights, that decide an answer."""
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    return tuple(p for p in (*(folder / name for name in SIDECARS), *more) if p.is_file())


def _vocabulary(tokenizer: Mapping[str, object], more: Mapping[str, object]) -> Vocabulary:
    """Of a tokenizer.json, whatever its kind; `more` is the added_tokens_decoder beside it."""
    model = tokenizer.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(listed, dict):
        ids = {k: v for k, v in listed.items() if isinstance(v, int)}
    elif isinstance(listed, list):  # Unigram: pairs of a piece and its score
        pairs = (item[0] if isinstance(item, list) and item else item for item in listed)
        ids = {text: i for i, text in enumerate(pairs) if isinstance(text, str)}
    added = tokenizer.get("added_tokens")
    tokens = [t for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    named = {str(t.get("content")): t["id"] for t in tokens if isinstance(t.get("id"), int)}
    for i, token in more.items():
        if i.isdecimal() and len(i) <= 9 and isinstance(token, dict):
            named.setdefault(str(token.get("content")), int(i))
    return Vocabulary(ids | named, frozenset(named.values()))


def _further(
    folder: Path, settings: Mapping[str, object], vocabulary: Vocabulary
) -> dict[str, object]:
    """Added tokens that tokenizer.json does not state, by id: of added_tokens_decoder, of an older
    added_tokens.json, and pieces of the vocabulary that only the names of special tokens make special."""
    stated = settings.get("added_tokens_decoder")
    more = dict(stated) if isinstance(stated, dict) else {}
    listed = {v.get("content") for v in more.values() if isinstance(v, dict)}
    named = {name for name in _special_names(folder, settings) if name not in listed}
    tokens = {name: vocabulary.ids[name] for name in named if name in vocabulary.ids}
    tokens |= _older(folder, settings, "added_tokens.json")
    for name, id in tokens.items():
        if isinstance(id, int) and id not in vocabulary.added and name not in listed:
            special = name in named
            more[str(id)] = {"content": name, "special": special, "normalized": not special}
    return more


def _special_names(folder: Path, settings: Mapping[str, object]) -> set[str]:
    """Everything that the tokenizer's own files call a special token."""
    older = _older(folder, settings, "special_tokens_map.json")
    found: list[object] = list(_names(folder, settings).values())
    for source in (settings, older):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key)
            found += value.values() if isinstance(value, dict) else []
            found += value if isinstance(value, list) else []
    texts = (v.get("content") if isinstance(v, dict) else v for v in found)
    return {text for text in texts if isinstance(text, str) and text}


def _older(folder: Path, settings: Mapping[str, object], name: str) -> dict[str, Any]:
    """A file of older checkpoints; where tokenizer_config.json lists all added tokens, it says nothing."""
    return {} if "added_tokens_decoder" in settings else optional_json(folder / name)


def _leading(tokenizer: Mapping[str, object], vocabulary: Vocabulary) -> int | None:
    """The token that the post-processor puts before every text."""
    steps = [tokenizer.get("post_processor")]
    while steps:
        step = steps.pop(0)
        if not isinstance(step, dict):
            continue
        if isinstance(step.get("processors"), list):
            steps += step["processors"]
        single = step.get("single")
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict):
            table, name = step.get("special_tokens"), str(token.get("id"))
            entry = table.get(name) if isinstance(table, dict) else None
            listed = entry.get("ids") if isinstance(entry, dict) else None
            return vocabulary.first([listed, vocabulary.named(name)])
    return None


def _names(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """bos_token, eos_token and the others, as the tokenizer's own files name them."""
    found = {}
    for key, value in (
        dict(settings) | _older(folder, settings, "special_tokens_map.json")
    ).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


# --- GGUF -----------------------------------------------------------------------------------------


def of_gguf(head: Mapping[str, object]) -> TokenizerSpec:
    """The tokenizer of a GGUF's metadata."""
    prefix = "tokenizer.ggml."
    arrays = {k.removeprefix(prefix): v for k, v in head.items() if k.startswith(prefix)}
    listed, types = arrays.get("tokens"), arrays.get("token_type")
    sound = isinstance(listed, list) and len(listed) <= tokenizer_json.MAX_TOKENS
    sound = sound and all(isinstance(t, str) for t in cast("list[object]", listed))
    tokens = cast("list[str]", listed) if sound else []  # what it is not, `tokenizer.check` says
    kinds = types.tolist() if isinstance(types, np.ndarray) else []
    added = frozenset(i for i, kind in enumerate(kinds) if kind in (2, 3, 4))
    ids = {text: i for i, text in reversed(list(enumerate(tokens)))}
    vocabulary = Vocabulary(ids, added)
    named = [arrays.get(f"{k}_token_id") for k in ("eos", "eot", "eom")] + [
        arrays.get("eos_token_ids")
    ]
    ends = tuple(i for i in vocabulary.ends(named) if i < len(tokens))
    bos = arrays.get("bos_token_id")
    bos = bos if isinstance(bos, int) and 0 <= bos < len(tokens) else None
    names = {}
    for kind, short in GGUF_NAMES.items():
        i = arrays.get(f"{kind}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            names[f"{short}_token"] = tokens[i]
    return TokenizerSpec(
        arrays=arrays, bos=bos, eos=ends, add_bos=_gguf_starts(arrays), names=names,
        templates=chat_templates.of_gguf(head),
    )  # fmt: skip


def _gguf_starts(arrays: Mapping[str, object]) -> bool:
    """Does a text begin with the start token? Files that do not say so are read as llama.cpp reads them."""
    stated = arrays.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    return arrays.get("model") in ("llama", "gemma4") or default_add_bos(
        str(arrays.get("pre", "default"))
    )
