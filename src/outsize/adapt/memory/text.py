"""The text to train on, as tokens of a tokenizer of its own: a byte-level BPE, trained on that text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.checkpoint.bounded import text_lines
from outsize.errors import DataError
from outsize.text.prompt_file import read

END = "<|endoftext|>"  # token 0, after each text
HELD_OUT_SHARE = 20  # one in so many tokens
LINES = 4096  # that are encoded at once


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens to train on, others to measure on, and what made them, as JSON."""

    train: Tensor
    held_out: Tensor
    tokenizer: str


def documents(paths: Sequence[Path]) -> Iterator[Iterator[str]]:
    """Each text's lines; of a .jsonl, each prompt with its answer is one. Raises DataError."""
    for path in paths:
        if ".jsonl" in path.suffixes:
            for line in read([path]):
                yield iter([f"{line.prompt}\n{line.answer or ''}\n"])
        else:
            yield (f"{line}\n" for line in text_lines(path, DataError))


def new_tokenizer(paths: Sequence[Path], vocab: int) -> str:
    """Train one of `vocab` tokens. Raises DataError for a text that has not so many pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator((line for text in documents(paths) for line in text), trainer)
    if made.get_vocab_size() < vocab:
        raise DataError(
            f"the text has pieces for {made.get_vocab_size():,} tokens, and {vocab:,} are due; give more text"
        )
    return made.to_str()


def encoded(paths: Sequence[Path], tokenizer: str, length: int) -> Text:
    """All texts as tokens, the last ones of each held out. Raises DataError where they are too few."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer)
    end, train, held_out = made.token_to_id(END) or 0, list[int](), list[int]()
    for path in paths:
        ids: list[int] = []
        for text in documents([path]):
            for some in _together(text):
                for found in made.encode_batch(some):
                    ids += found.ids
            ids.append(end)
        cut = len(ids) - len(ids) // HELD_OUT_SHARE
        train += ids[:cut]
        held_out += ids[cut:]
    need = length + 1
    if len(train) <= need or len(held_out) < need:
        raise DataError(
            f"the text has {len(train) + len(held_out):,} tokens; {HELD_OUT_SHARE * need:,} are the least "
            f"for sequences of {length:,}, trained and measured on: give more --data, or a shorter --length"
        )
    kind = torch.int32
    return Text(
        torch.tensor(train, dtype=kind, device="cpu"),
        torch.tensor(held_out, dtype=kind, device="cpu"),
        tokenizer,
    )


def _together(lines: Iterator[str]) -> Iterator[list[str]]:
    some: list[str] = []
    for line in lines:
        some.append(line)
        if len(some) == LINES:
            yield some
            some = []
    if some:
        yield some
