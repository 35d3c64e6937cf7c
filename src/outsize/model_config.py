"""A model's configuration, as data: the pack carries a `Description`, and one `Transformer` is built from it.

A family file (family/) makes it from a published config; that is needed to pack, never to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from outsize.model_parts import Delta, Latent, Shard

BIASED = "clamped_swiglu"  # of experts with biases
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", BIASED)
THRESHOLD = r"fatrelu:(0|[1-9][0-9]{0,3})\.[0-9]{1,6}"  # one with a threshold
SCORES = ("softmax", "sigmoid")
MIXERS = ("attention", "delta", "conv")  # what lets a layer's tokens know of each other


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864): pair i of a head is rotated by the angle
    position * base ** (-i / (rotated / 2)) / divisors[i], and multiplied by `scale`."""

    base: float
    divisors: tuple[float, ...] = ()
    scale: float = 1.0
    rotated: int | None = None  # of a head's numbers, the first ones; None: all
    original: int = 0  # positions that training knew, where any of the next three is used
    long_divisors: tuple[
        float, ...
    ] = ()  # in place of `divisors`, in a context beyond the original
    growth: float = 0.0  # dynamic: beyond the original positions the base grows, by this factor
    query_growth: float = 0.0  # queries grow by 1 + this * log(1 + position // original)
    query_shift: int = 0  # added to the position there

    def pairs(self, head_dim: int) -> int:
        """How many pairs of a head rotate."""
        return (head_dim if self.rotated is None else self.rotated) // 2

    def for_context(self, context: int) -> Rope:
        """The rope of a run of so many positions: one of two sets of divisors (LongRoPE)."""
        if not self.long_divisors:
            return self
        divisors = self.long_divisors if context > self.original else self.divisors
        return replace(self, divisors=divisors, long_divisors=(), original=0)


@dataclass(frozen=True, slots=True)
class Layer:
    """What differs from layer to layer: the rope, and how many tokens attention sees (None: all). `chunked`:
    those of the token's own piece of so many positions, instead of the last ones."""

    rope: Rope
    window: int | None = None
    dense: bool = False  # in a model with experts: a plain feed-forward instead
    chunked: bool = False
    unit_norm: bool = False  # query and key heads are normed, without weights
    shares: int | None = None  # makes queries alone: keys and values are this earlier layer's
    mixer: str = "attention"  # one of MIXERS
    head_dim: int = 0  # its heads' numbers, its key heads, its feed-forward's width: where not the
    num_kv_heads: int = 0  # model's own, which 0 stands for
    ffn_width: int = 0

    @property
    def form(self) -> tuple[int, int, int]:
        """Its own sizes."""
        return self.head_dim, self.num_kv_heads, self.ffn_width


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of `count` experts as feed-forward, of which each token uses `used`."""

    count: int
    used: int
    width: int  # of one expert
    renorm: bool  # are the used ones' weights made to sum to 1?
    bias: bool = False  # of the router and of each expert's maps
    score: str = "softmax"  # what makes weights of the router's logits, one of SCORES
    choice_bias: bool = False  # added to the weights where experts are chosen, and only there
    groups: int = 1  # equal groups of experts, of which the best `used_groups` are chosen first
    used_groups: int = 1
    scale: float = 1.0  # times the weights, at the end
    shared: int = 0  # width of an expert that every token uses beside its own; 0: none
    weighs_input: bool = False  # what enters an expert is weighed, not what comes out
    shared_gate: bool = False  # that one's output times the sigmoid of a product of its own
    nested: bool = False  # pieces of one feed-forward: each token uses the first few, unweighed
    beside: bool = False  # the one for all tokens, router and others each have norms of their own


@dataclass(frozen=True, slots=True)
class Memory:
    """Feed-forwards that read nothing but the token's embedding, so that each is a table over the vocabulary
    (MemoryLLM, arXiv 2602.00398): h += feed_forward(norm(embedding)), beside or instead of one that reads
    the residual stream."""

    dense: int = 0  # width of that one (Flex-MemoryLLM); 0: there is none
    is_table: bool = False  # looked up by token, and not computed
    ranks: tuple[int, ...] = ()  # numbers of a token in each layer's table, of which a
    # basis makes the model's width; (): the width itself
    off: tuple[int, ...] = ()  # layers whose memory a run leaves out (lossy)

    def widths(self, d: Description) -> tuple[int, ...]:
        """Numbers of a token in each layer's table."""
        return self.ranks or (d.width,) * d.num_layers


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
    pre_norm: bool = True  # norms before attention and before the feed-forward
    residual_scale: float = 1.0  # times what a sub-layer adds to the residual stream
    logit_scale: float = 1.0  # times the logits
    logit_cap: float = 0.0  # logits x become cap * tanh(x / cap); 0: they stay
    attn_cap: float = 0.0  # the same of attention's scores
    latent: Latent | None = None  # attention over a latent that all heads share
    two_matrix: bool = False  # a feed-forward is down(activation(up(x))), without a gate
    layer_norm: bool = False  # norms are LayerNorms, with biases, instead of RMSNorms
    positions: bool = False  # a learned vector of each position is added to its token's
    parallel: bool = False  # a feed-forward reads what its layer's attention reads
    memory: Memory | None = None  # feed-forwards of the token's embedding
    gated: bool = False  # what attention sums is multiplied by the sigmoid of a map of its own
    delta: Delta | None = None  # of the layers with that mixer
    further: bool = (
        False  # a layer that drafts with the states of another model, whose embedding it reads
    )
    kernel: int = 0  # tokens of the short convolution of layers with that mixer
    shard: Shard | None = None  # of one of several ranks: the sizes above are what it has
    value_norm: bool = False  # values are normed by heads, without weights
    token_width: int = (
        0  # numbers of a token itself that each layer reads, from a row of all layers'
    )
    out_scale: bool = False  # at the end of a layer the residual stream is multiplied by a number

    @property
    def whole(self) -> Description:
        """The model that this is a part of."""
        s = self.shard
        if s is None:
            return self
        whole = replace(self, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads)
        return replace(whole, shard=None, ffn_width=s.ffn_width)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_kv_layers(self) -> int:
        """Layers that make keys and values, and keep them: the first ones."""
        return sum(layer.shares is None for layer in self.layers)

    def of_layer(self, index: int) -> Description:
        """The model as one layer has it: its sizes are that layer's."""
        head_dim, heads, inner = self.layers[index].form
        if not (head_dim or heads or inner):
            return self
        return replace(
            self,
            head_dim=head_dim or self.head_dim,
            num_kv_heads=heads or self.num_kv_heads,
            ffn_width=inner or self.ffn_width,
        )

    @property
    def forms(self) -> tuple[Description, ...]:
        """The model as layers of each size have it."""
        first = {layer.form: i for i, layer in reversed([*enumerate(self.layers)])}
        return tuple(self.of_layer(i) for i in sorted(first.values()))

    @property
    def kv_sizes(self) -> tuple[tuple[int, int], ...]:
        """Key heads and numbers of a head, of each layer that may keep keys and values."""
        each = (self.of_layer(i) for i in range(self.num_kv_layers))
        return tuple((d.num_kv_heads, d.head_dim) for d in each)

    @property
    def is_even(self) -> bool:
        """Do all layers keep entries of one size?"""
        return len(set(self.kv_sizes)) < 2

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each kind once, in order."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def rope_sizes(self) -> dict[Rope, int]:
        """Of each kind, the numbers of the heads that it turns."""
        return {layer.rope: layer.head_dim or self.head_dim for layer in self.layers}

    @property
    def routed(self) -> tuple[int, ...]:
        """The layers that have experts."""
        if self.mixture is None:
            return ()
        return tuple(i for i, layer in enumerate(self.layers) if not layer.dense)

    @property
    def is_nested(self) -> bool:
        """Are its feed-forwards cut into nested experts?"""
        return self.mixture is not None and self.mixture.nested

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that keep keys and values of their own."""
        return tuple(i for i in self.mixed_by("attention") if self.layers[i].shares is None)

    def mixed_by(self, mixer: str) -> tuple[int, ...]:
        """The layers with this mixer."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer == mixer)

    @property
    def has_states(self) -> bool:
        """Do some layers keep something else of a sequence than keys and values?"""
        return any(layer.mixer != "attention" for layer in self.layers)

    @property
    def is_usual(self) -> bool:
        """Is it a dense decoder without what few families have? Training and adapters know those only."""
        ropes = all(Rope(r.base, r.divisors, r.scale) == r for r in self.ropes)
        return self._says(USUAL) and ropes

    @property
    def is_measured(self) -> bool:
        """Can a copy of it be run with gradients? Those that are usual, and two-matrix feed-forwards."""
        ropes = all(Rope(r.base, r.divisors, r.scale, r.rotated) == r for r in self.ropes)
        return self._says((*USUAL, *CLASSIC)) and ropes

    def _says(self, names: Sequence[str]) -> bool:
        """Does it say what these fields say, and nothing else?"""
        known = Description(**{name: getattr(self, name) for name in names})
        return known == self and all(Layer(x.rope, x.window) == x for x in self.layers)

    def for_context(self, context: int) -> Description:
        """As a run of so many positions computes it."""
        layers = (replace(layer, rope=layer.rope.for_context(context)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    @property
    def has_table(self) -> bool:
        """Are feed-forwards looked up by token?"""
        return self.memory is not None and self.memory.is_table

    @property
    def reads_tokens(self) -> bool:
        """Do layers read the tokens themselves?"""
        return self.memory is not None or self.token_width > 0

    @property
    def layers_off(self) -> tuple[int, ...]:
        """The layers whose memory a run leaves out (lossy)."""
        return () if self.memory is None else self.memory.off

    @property
    def has_ffn(self) -> bool:
        """Has a layer weights of a feed-forward? Not where all of it is looked up."""
        return self.memory is None or not self.memory.is_table or self.memory.dense > 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


# What a description may say, and be a usual one.
USUAL = (
    "family", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width", "vocab_size", "context",
    "norm_eps", "attn_scale", "layers", "activation", "embed_scale", "qkv_bias", "o_bias", "mlp_bias",
    "qk_norm", "post_norm", "tied",
)  # fmt: skip
# What models of before 2023 say besides.
CLASSIC = ("two_matrix", "layer_norm", "positions", "parallel")
