"""Sets of tokens that ask for what the training text said, and for what the sequence has shown; and how much
two labellings say of each other.

Shapes: R sequences, S tokens (one more is given), V vocabulary, N things with two labels each.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST, SURE = 8, 0.9  # times that the training text has three tokens; share that goes on alike
FORMS = (
    r" [a-z]+", r" [A-Z][a-z]*", r" [A-Z]+", r"[a-z]+", r"[A-Z][a-z]*", r"[A-Z]+", r" ?[0-9]+", r"\s+",
    r" ?[^\w\s]+", r" ?[^\W\d_]+",
)  # fmt: skip


class Probes:
    """Of a training text."""

    def __init__(self, train: NDArray[np.int32], vocab: int) -> None:
        self._vocab = vocab
        ids = train.astype(np.int64)
        self._after_three = _after(_keys(ids, 3, vocab), ids[3:], vocab)
        self._after_one = _after(ids[:-1], ids[1:], vocab)

    def facts(self, rows: Tensor) -> Tensor:
        """(R, S) bool: nearly always so after these three tokens, and not shown in the sequence."""
        known, best, total, share = self._after_three
        out = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool, device="cpu")
        for i, row in enumerate(rows.numpy()):
            keys = _keys(row, 3, self._vocab)
            at = np.searchsorted(known, keys).clip(0, len(known) - 1)
            is_sure = (known[at] == keys) & (total[at] >= LEAST) & (share[at] >= SURE)
            is_fact = is_sure & (best[at] == row[3:]) & ~_shown(row)[2:]
            out[i, 2:] = torch.from_numpy(is_fact)
        return out

    def copies(self, rows: Tensor) -> Tensor:
        """(R, S) bool: the sequence has shown it after the same token, and it is not the likeliest there."""
        known, best, _, _ = self._after_one
        out = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool, device="cpu")
        for i, row in enumerate(rows.numpy()):
            at = np.searchsorted(known, row[:-1]).clip(0, len(known) - 1)
            is_usual = (known[at] == row[:-1]) & (best[at] == row[1:])
            out[i] = torch.from_numpy(_shown(row) & ~is_usual)
        return out


def _keys(ids: NDArray[np.int64], count: int, vocab: int) -> NDArray[np.int64]:
    """A number for each run of so many tokens that has one after it."""
    out = np.zeros(len(ids) - count, np.int64)
    for i in range(count):
        out = out * vocab + ids[i : len(ids) - count + i]
    return out


def _after(
    keys: NDArray[np.int64], then: NDArray[np.int64], vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Sorted keys, and for each: what most often comes after, how often it was there, and that share."""
    pairs, counts = np.unique(keys * vocab + then, return_counts=True)
    order = np.lexsort((counts, pairs // vocab))
    pairs, counts = pairs[order], counts[order]
    known, first = np.unique(pairs // vocab, return_index=True)
    last = np.append(first[1:], len(pairs)) - 1  # the most frequent of each
    total = np.add.reduceat(counts, first)
    return known, pairs[last] % vocab, total, counts[last] / total


def _shown(row: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(S,): was a token already there after the one before it?"""
    seen, out = set[tuple[int, int]](), np.zeros(len(row) - 1, np.bool_)
    for i, pair in enumerate(zip(row[:-1].tolist(), row[1:].tolist(), strict=True)):
        out[i] = pair in seen
        seen.add(pair)
    return out


def form(piece: str) -> int:
    """How a token looks: small or capital letters, digits, signs, at a word's beginning or not; ending."""
    kind = next((i for i, p in enumerate(FORMS) if re.fullmatch(p, piece)), len(FORMS))
    ending = next(
        (i for i, e in enumerate(("ing", "ed", "s", "er", "ly"), 1) if piece.endswith(e)), 0
    )
    return kind * 6 + (ending if kind < 6 else 0)


def information(a_N: Tensor, b_N: Tensor) -> float:
    """Nats that one label says of the other."""
    joint = torch.zeros(int(a_N.max()) + 1, int(b_N.max()) + 1, dtype=torch.float64, device="cpu")
    joint.index_put_((a_N, b_N), torch.ones((), dtype=torch.float64, device="cpu"), accumulate=True)
    p = joint / joint.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    is_there = p > 0
    return float((p[is_there] * (p[is_there] / independent[is_there]).log()).sum())


def shared_information(a_N: Tensor, b_N: Tensor) -> float:
    """The same, as a share of the mean of what each is by itself: 1 for the same labels."""
    return 2 * information(a_N, b_N) / (information(a_N, a_N) + information(b_N, b_N))
