"""What a pack holds or would hold, from headers alone: enough to plan with, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from outsize.checkpoint import tokenizer
from outsize.checkpoint.checkpoint import Checkpoint
from outsize.family.find import recipe
from outsize.family.recipe import Recipe
from outsize.model_config import Description
from outsize.pack import tokenizer_file
from outsize.pack.format import Pack, Quality
from outsize.pack.layout import plan
from outsize.pack.tables import TableHeader

PIECE_JSON = 9  # bytes that a piece, or a merge, takes in tokenizer.json beyond its text


@dataclass(frozen=True, slots=True)
class PagedNeurons:
    """A model whose steps of few rows compute only some neurons, as the planner sees it."""

    memory: int  # bytes of predictors, and of room for one layer's matrices
    fires: float  # share of the bundles that a token computes
    hit_rates: tuple[tuple[float, float], ...]  # (share of bundles with slots, hit rate), rising
    cost: str  # what it costs, in words
    note: str = ""  # why it pays, or does not
    runs: float = 0.0  # of neighbours that a layer computes for a token; 0: not measured
    gap: float = 0.0  # what beginning a read costs, in bundles that are read along
    computes: float = 1.0  # share of a dense feed-forward's time that those chosen take


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One width of nested experts: its share of the feed-forwards, what it costs, and of a token's uses of
    pieces those that the most used ones have, by so many of them."""

    share: float
    perplexity: float
    kl: float
    agrees: float
    uses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NestedFamily:
    """Nested experts with an add-on, as the planner sees them; the last row is the whole model."""

    memory: int  # bytes of routers and corrections
    total: int  # of all pieces
    rows: tuple[FamilyRow, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A model as the planner sees it."""

    name: str
    description: Description
    tables: tuple[TableHeader, ...]
    tokenizer_bytes: int  # of tokenizer.json
    is_packed: bool
    sha256: str = ""  # of what it was or would be made from, where that is known
    kin: tuple[str, ...] = ()  # the same, of models whose numbers its own were made from
    quality: Quality | None = None  # as measured when it was made from another pack
    drafting: int = 0  # bytes that a drafter keeps
    copies: int = 0  # bytes of slots for copies of experts at fewer bits
    step_scratch: int = 0  # bytes that a step's draft tokens take for a moment
    adapters: Mapping[str, int] = field(default_factory=dict)  # bytes of each, by name
    making: int = 0  # bytes that reading an adapter takes for a moment
    smaller: Outline | None = None  # of a draft model, which is held whole
    streams: int = 1  # replies that are computed at once
    has_template: bool = False  # a chat template, which a process of its own renders
    kv: str = "auto"  # how keys and values are kept, or int8
    staging: int = 0  # bytes of blocks of the prefix cache on their way to and from a disk
    held: int = (
        0  # bytes a token of a prompt that a layer of a rank keeps until its feed-forward has them
    )
    grammars: int = 0  # replies at once that may have to obey a schema or a grammar
    neurons: PagedNeurons | None = None  # then there are tables of their bundles, too
    nested: NestedFamily | None = None  # of a pack of nested experts with an add-on
    pins_pieces: bool = (
        False  # of nested experts: those used most stay, as no other policy was asked for
    )

    @property
    def size(self) -> int:
        return sum(table.size for table in self.tables)

    @property
    def activation_bytes(self) -> int:
        """Of one number of an activation, key or value."""
        first = next(t for t in self.tables if t.name.startswith("attn"))
        return 4 if first.tensors["o"][0].encoding == "fp32" else 2

    def is_for_prompts(self, t: TableHeader) -> bool:
        """Is it read by long spans alone, since steps of few rows page its neurons?"""
        return self.neurons is not None and t.name.startswith("ffn-")

    def table(self, name: str) -> TableHeader:
        return next(t for t in self.tables if t.name == name)


def of_pack(pack: Pack) -> Outline:
    size = tokenizer_file.size(pack.path)
    return Outline(
        pack.path.name, pack.description, pack.tables, size, True, pack.source.sha256,
        pack.source.kin, pack.quality, has_template=bool(pack.chat_templates),
    )  # fmt: skip


def of_checkpoint(
    checkpoint: Checkpoint,
    name: str,
    wanted: str,
    grouped: bool,
    find: Callable[[Checkpoint], Recipe] = recipe,
) -> Outline:
    """Raises CheckpointError, UnsupportedError."""
    tokenizer.check(checkpoint.tokenizer)
    found = find(checkpoint)
    tables = tuple(t.header for t in plan(checkpoint, found, wanted, grouped))
    return Outline(
        name, found.description, tables, _tokenizer_bytes(checkpoint), False,
        has_template=bool(checkpoint.tokenizer.templates),
    )  # fmt: skip


def _tokenizer_bytes(checkpoint: Checkpoint) -> int:
    """About the size that tokenizer.json will have. Scores, unlike merges, state no joins: a piece of
    those vocabularies has about two."""
    spec = checkpoint.tokenizer
    if spec.json is not None:
        return len(spec.json)
    tokens, merges = (_text_bytes(spec.arrays.get(k)) for k in ("tokens", "merges"))
    return tokens + (merges or 3 * tokens)


def _text_bytes(items: object) -> int:
    if not isinstance(items, list):
        return 0
    return sum(len(str(item)) + PIECE_JSON for item in items)


def head_of(d: Description) -> str:
    """The name of the table that gives logits."""
    return "embed" if d.tied else "head"
