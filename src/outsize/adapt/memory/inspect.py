"""What a token's memory says, of models whose feed-forwards read the token's embedding: all that they can be
asked is the vocabulary, so that each can be read out (token, key, value; arXiv 2602.00398, section 3.3).

For token t with normed embedding q, key k of a layer has the coefficient (q . up_k) * act(q . gate_k), and
the layer adds the sum of coefficients times values, which are down's columns.
Shapes: V tokens, N some of them, L layers, D width, F keys of a layer, P numbers of a projection, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from outsize.engine import open_tokens
from outsize.errors import OptionError, UnsupportedError
from outsize.kernels.plain import ACTIVATIONS
from outsize.pack.format import Pack
from outsize.storage.records import Records
from outsize.text.tokens import UNFINISHED, Tokens

BLOCK = 256  # tokens at once
PROJECTED, ROUNDS = 64, 20  # numbers of a token that is clustered; rounds of k-means


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a layer, its coefficient for a token, and the tokens that its value speaks for (against, where
    the coefficient is below 0)."""

    layer: int
    key: int
    coefficient: float
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a token."""

    token: int
    text: str
    keys: tuple[Key, ...]
    nearest: tuple[
        tuple[str, float], ...
    ]  # tokens, and the cosine of their memories with this one's

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class Reader:
    """A pack's memories, layer by layer, in fp32."""

    def __init__(self, pack: Pack, records: Records) -> None:
        d = pack.description
        if d.memory is None or d.memory.is_table:
            what = (
                "has its feed-forwards in a table"
                if d.memory is not None
                else f"is a {d.family} model"
            )
            raise UnsupportedError(
                f"{pack.path.name} {what}; keys are read of a model that computes feed-forwards of the "
                "token's embedding: name one that `outsize adapt memory --config` trained"
            )
        self.description, self._records = d, records
        self.tokens: Tokens = open_tokens.tokens(pack)
        self.embed_VD = torch.cat(list(self._embedding(pack)))[: d.vocab_size]

    def _embedding(self, pack: Pack) -> Iterator[Tensor]:
        table = pack.table_of("embed")
        for number in range(len(table.keys)):
            (w,) = self._records.read(table, number)["embed"]
            yield w.encoding.decode(w.fields)[: w.num_rows].clone()

    def text(self, token: int) -> str:
        """A token's text; the name of one that has none of its own: a control token, a part of a letter."""
        text = self.tokens.decode([token])
        return self.tokens.piece(token) if not text or UNFINISHED in text else text

    @cache  # noqa: B019  it lives as long as a command
    def _maps(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        names = ("ffn_norm", "gate_up", "down")
        norm, gate_up, down = (self._records.layer(layer, name) for name in names)
        return norm[0], gate_up, down

    def coefficients(self, layer: int, ids: Sequence[int]) -> Tensor:
        """(N, F)."""
        norm_D, gate_up, _ = self._maps(layer)
        some = torch.tensor(ids, dtype=torch.int64, device="cpu")
        q_ND = rms_norm(self.embed_VD[some], norm_D.shape, norm_D, self.description.norm_eps)
        gate_NF, up_NF = (q_ND @ gate_up.T).chunk(2, 1)
        return ACTIVATIONS[self.description.activation](gate_NF) * up_NF

    def values(self, layer: int, ids: Sequence[int]) -> Tensor:
        """(N, D): what a layer adds."""
        return self.coefficients(layer, ids) @ self._maps(layer)[2].T

    def keys(self, layer: int, token: int, count: int, words: int) -> list[Key]:
        """The keys of the largest coefficients times the size of their values."""
        down_DF = self._maps(layer)[2]
        c_F = self.coefficients(layer, [token])[0]
        strength = c_F.abs() * down_DF.norm(dim=0)
        out = []
        for key in strength.topk(min(count, len(c_F))).indices.tolist():
            said_V = self.embed_VD @ down_DF[:, key] * c_F[key].sign()
            said = tuple(self.text(i) for i in said_V.topk(words).indices.tolist())
            out.append(Key(layer, key, round(float(c_F[key]), 4), said))
        return out

    def nearest(
        self, token: int, count: int, tick: Callable[[int], None]
    ) -> list[tuple[str, float]]:
        """The tokens whose memories, of all layers, have the largest cosine with a token's."""
        layers, size = range(self.description.num_layers), self.description.vocab_size
        dot, square = torch.zeros(2, size, dtype=torch.float32, device="cpu")
        for layer in layers:
            own_D = self.values(layer, [token])[0]
            for at in range(0, size, BLOCK):
                some = self.values(layer, range(at, min(size, at + BLOCK)))
                dot[at : at + BLOCK] += some @ own_D
                square[at : at + BLOCK] += (some**2).sum(1)
            tick(layer + 1)
        cosine = dot / (square * square[token]).sqrt().clamp_min(1e-30)
        cosine[token] = -2.0
        found = cosine.topk(min(count, size - 1))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(self.text(i), round(c, 4)) for i, c in pairs]

    def projected(self, layer: int) -> Tensor:
        """(V, P): each token's coefficients of a layer, of unit length, in a random projection that keeps
        distances about."""
        size, keys = self.description.vocab_size, self._maps(layer)[2].shape[1]
        generator = torch.Generator().manual_seed(0)
        count = min(PROJECTED, keys)
        map_FP = torch.randn(keys, count, generator=generator, dtype=torch.float32, device="cpu")
        blocks = (range(at, min(size, at + BLOCK)) for at in range(0, size, BLOCK))
        unit = torch.nn.functional.normalize
        return torch.cat([unit(self.coefficients(layer, ids)) @ map_FP for ids in blocks])


def token_ids(reader: Reader, texts: Sequence[str]) -> list[int]:
    """The tokens of some texts, each once. Raises OptionError for a text without any."""
    out: dict[int, None] = {}
    for text in texts:
        ids = reader.tokens.encode(text, start=False)
        if not ids:
            raise OptionError(
                f"token is {text!r}, which has no tokens; name a word, or a part of one"
            )
        out |= dict.fromkeys(ids)
    return list(out)


def look(reader: Reader, token: int, keys: int, near: int, tick: Callable[[int], None]) -> Seen:
    """A token's strongest keys of each layer, and the tokens with the nearest memories."""
    layers = range(reader.description.num_layers)
    found = [key for layer in layers for key in reader.keys(layer, token, keys, 5)]
    return Seen(token, reader.text(token), tuple(found), tuple(reader.nearest(token, near, tick)))


def clusters(x_VP: Tensor, count: int) -> Tensor:
    """(V,): k-means (Lloyd's), begun with points that are far from each other, the same each time."""
    centres = x_VP[:1].clone()
    near_V = ((x_VP - centres[0]) ** 2).sum(1)
    for _ in range(count - 1):
        centres = torch.cat([centres, x_VP[near_V.argmax()][None]])
        near_V = torch.minimum(near_V, ((x_VP - centres[-1]) ** 2).sum(1))
    for _ in range(ROUNDS):
        label_V = _nearest(x_VP, centres)
        sums = torch.zeros_like(centres).index_add_(0, label_V, x_VP)
        sizes = label_V.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return _nearest(x_VP, centres)


def _nearest(x_VP: Tensor, centres: Tensor) -> Tensor:
    """(V,): which of the centres."""
    found: Tensor = torch.cdist(x_VP, centres).argmin(1)
    return found


def plane(x_VP: Tensor) -> Tensor:
    """(V, 2): the two directions in which points differ most, from 0 to 1."""
    middle = x_VP - x_VP.mean(0)
    _, vectors = torch.linalg.eigh(middle.T @ middle)
    at_V2 = middle @ vectors[:, -2:]
    low, high = at_V2.amin(0), at_V2.amax(0)
    placed: Tensor = (at_V2 - low) / (high - low).clamp_min(1e-30)
    return placed
