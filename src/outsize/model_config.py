"""A model's configuration, as data: the pack carries a `Description`, and one `Transformer` is built from it.

A family file (family/) makes it from a published config; that is needed to pack, never to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

BIASED = "clamped_swiglu"  # of experts with biases
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", BIASED)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864): pair i of a head is rotated by the angle
    position * base ** (-i / (head_dim / 2)) / divisors[i], and multiplied by `scale`."""

    base: float
    divisors: tuple[float, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """What differs from layer to layer: the rope, and how many tokens attention sees (None: all)."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of `count` experts as feed-forward, of which each token uses `used`."""

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
    activation: str = "silu"  # one of ACTIVATIONS
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False  # of a dense feed-forward's gate, up and down
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


@dataclass(frozen=True, slots=True)
class Recipe:
    """A description, and where a checkpoint keeps what it describes."""

    description: Description
    names: Mapping[str, str]  # our name -> foreign name; {i} is the layer
    interleaved: bool  # foreign query/key rows already rotate in adjacent pairs
    norm_shift: float = 0.0  # added to norm weights (families that store w - 1)
    paired: bool = False  # experts as one stack, transposed, rows of gate and up in turn
    spares: tuple[str, ...] = ()  # patterns of foreign tensors that a text model needs not
