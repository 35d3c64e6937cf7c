"""What a model is, as data: the pack carries a `Description`, and one `Transformer` is built from it.

A family file reads a config, names the foreign tensors and states its true deviations; it is needed
to pack, never to run. The file name is the registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from outsize.errors import CheckpointError, PackError


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: pair i turns by position * base ** (-i / (head_dim / 2)) / divisors[i], and is
    made `scale` times as long."""

    base: float
    divisors: tuple[float, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """What differs from layer to layer: attention reach (None: everything) and rope."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """A feed-forward of `count` experts, of which each token uses `used`."""

    count: int
    used: int
    width: int  # of one expert
    renorm: bool  # are the used ones' weights made to sum to 1?
    bias: bool = False  # of the router and of each expert's maps


@dataclass(frozen=True, slots=True)
class Description:
    """One decoder-only transformer. Heads rotate in adjacent pairs (0,1), (2,3), ..."""

    family: str
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    context: int
    norm_eps: float
    attn_scale: float
    layers: tuple[Layer, ...]
    activation: str = "silu"  # or "gelu_tanh", "clamped_swiglu"
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # each head may attend to nothing, with a learned score
    qk_norm: bool = False
    qk_norm_whole: bool = False  # all query heads normed as one vector, and all key heads
    post_norm: bool = False  # norms after attention and after the feed-forward, too
    tied: bool = False  # the head is the embedding
    mixture: Mixture | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each kind once, in order."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def from_json(data: Mapping[str, object]) -> Description:
    """The inverse of `to_json`. Raises PackError."""
    try:
        values = dict(data)
        layers = tuple(_layer(item) for item in values.pop("layers"))  # type: ignore[attr-defined]
        mixed = values.pop("mixture", None)
        mixture = None if mixed is None else Mixture(**mixed)  # type: ignore[arg-type]
        return Description(layers=layers, mixture=mixture, **values)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError) as e:
        raise PackError(
            f"the pack's description is malformed ({e}); pack the model again"
        ) from None


def _layer(item: Mapping[str, object]) -> Layer:
    rope = item["rope"]
    made = Rope(float(rope["base"]), tuple(rope["divisors"]), float(rope.get("scale", 1.0)))  # type: ignore[index,attr-defined]
    return Layer(made, item["window"])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A description, and where a checkpoint keeps what it describes."""

    description: Description
    names: Mapping[str, str]  # our name -> foreign name; {i} is the layer
    interleaved: bool  # foreign query/key rows already rotate in adjacent pairs
    norm_shift: float = 0.0  # added to norm weights (families that store w - 1)
    paired: bool = False  # experts as one stack, transposed, rows of gate and up in turn


GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
LIMITS = {"num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}


@dataclass(frozen=True, slots=True)
class Config:
    """A checkpoint's config under one set of names, whichever format it came from."""

    format: str
    architecture: str
    values: Mapping[str, object]
    names: frozenset[str]  # foreign tensor names
    vocab_size: int
    divisors: tuple[float, ...] = field(default=())  # rope divisors stored as a tensor (GGUF)

    def get(self, key: str) -> object:
        if self.format == "gguf":
            return self.values.get(f"{self.architecture}.{GGUF_KEYS.get(key, key)}")
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        limit = LIMITS.get(key, 1 << 24)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise CheckpointError(
                f"config: {key} is {value!r}, a whole number from 1 to {limit:,} is expected; "
                "the checkpoint is damaged or of a kind outsize does not know"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(f"config: {key} is {value!r}, a positive number is expected")
        return float(value)

    def rope(self, kind: str = "") -> Rope:
        """The rope of full attention; `kind` names a sub-table of newer configs."""
        head = self.integer("head_dim", 0) or self.integer("hidden_size") // self.integer(
            "num_attention_heads"
        )
        table = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"config: rope scaling is {table!r}, an object is expected")
        inner = table.get(kind)
        table = inner if isinstance(inner, dict) else table
        base = table.get("rope_theta") or self.number("rope_theta", 10000.0)
        if self.format == "gguf":
            return Rope(base, self.divisors or self._gguf_divisors(head))
        if table.get("rope_type", table.get("type")) == "yarn":
            return yarn(table, float(base), head)
        return Rope(float(base), rope_divisors(table, float(base), head))

    def _gguf_divisors(self, head: int) -> tuple[float, ...]:
        kind = self.get("rope.scaling.type")
        if kind not in (None, "none", "linear"):
            raise CheckpointError(f"rope scaling {kind!r} is not known; known are linear, llama3")
        factor = self.number("rope.scaling.factor", 1.0)
        return (factor,) * (head // 2) if factor != 1.0 else ()


def rope_divisors(table: Mapping[str, object], base: float, head_dim: int) -> tuple[float, ...]:
    """Divisors of a Hugging Face rope scaling table. Raises CheckpointError for an unknown kind."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind in ("default", None):
        return ()
    factor = _positive(table, "factor")
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    if kind == "llama3":
        return _llama3_divisors(table, factor, base, head_dim)
    raise CheckpointError(f"rope scaling {kind!r} is not known; known are default, linear, llama3")


def yarn(table: Mapping[str, object], base: float, head_dim: int) -> Rope:
    """YaRN (arXiv 2309.00071): fast pairs are kept, slow ones slowed by `factor`, those between blended;
    all made longer by a tenth of the factor's logarithm."""
    factor, original = (
        _positive(table, "factor"),
        _positive(table, "original_max_position_embeddings"),
    )
    stated = {"beta_fast": 32.0, "beta_slow": 1.0} | dict(table)

    def pair(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(_positive(stated, "beta_fast")), pair(_positive(stated, "beta_slow"))
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    divisors = []
    for i in range(head_dim // 2):
        slowed = min(1.0, max(0.0, (i - low) / max(high - low, 1e-3)))
        divisors.append(1 / (slowed / factor + 1 - slowed))
    scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if table.get("attention_factor") is not None:
        scale = _positive(table, "attention_factor")
    return Rope(base, tuple(divisors), scale)


def _positive(table: Mapping[str, object], key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config: rope scaling {key} is {value!r}, a positive number is due")
    return float(value)


def _llama3_divisors(
    table: Mapping[str, object], factor: float, base: float, head_dim: int
) -> tuple[float, ...]:
    """Llama 3: slow pairs are slowed by `factor`, fast ones kept, those between blended."""
    low, high = _positive(table, "low_freq_factor"), _positive(table, "high_freq_factor")
    original = _positive(table, "original_max_position_embeddings")
    if high <= low:
        raise CheckpointError(f"config: rope high_freq_factor {high} is not above low {low}")
    out = []
    for i in range(head_dim // 2):
        turns = original * base ** (-2 * i / head_dim) / (2 * math.pi)  # over the old context
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        out.append(1 / ((1 - blend) / factor + blend))
    return tuple(out)
