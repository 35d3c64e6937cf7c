"""Layers: a record is one layer's attention, or its feed-forward (with experts: its router). The model's last
norm is one record of a table of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outsize.errors import UnsupportedError
from outsize.model_config import Description, Memory, Mixture
from outsize.model_parts import Latent
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.mixers import conv_specs, delta_specs
from outsize.pack.records import POSITIONS, Specs, TensorSpec, lay_out, matrix, record_fault, vector
from outsize.pack.specs import beside, ffn_norm, layer_end, norms, two_matrix
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Record, SourceTensors, TablePlan

GOLDEN = 0.6180339887498949
FINAL, FURTHER = "final", "further"
SHARING = "sharing"  # attention of layers that make queries alone
ORDER = "memory_order"  # of a table of feed-forwards: the row of each token
BESIDE = "dense_"  # what names of a dense feed-forward beside one of the embedding begin with
CONV = "conv"  # of short convolutions, in place of attention
DELTA = "delta"  # of the gated delta rule, in place of attention
WIDE = "wide"  # begins the names of tables of layers whose sizes are not the model's own
DENSE = "dense"  # feed-forwards of layers without experts, in a model that has some


class Layers(Kind):
    """The keys of a table's header are its layers' numbers. Layers of equal encodings make one table."""

    def groups(self, d: Description) -> Sequence[Group]:
        final = {**norms(d, "final_norm"), **_beside_table(d)}
        if d.positions:
            final[POSITIONS] = matrix(d.width, (POSITIONS, d.context))
        delta = (Group(DELTA, 2, delta_specs(d, d.delta)),) if d.delta is not None else ()
        conv = (Group(CONV, 2, conv_specs(d)),) if d.mixed_by("conv") else ()
        return (
            *_attentions(d),
            *delta,
            *conv,
            *(_ffns(d) if d.has_ffn else ()),
            Group(FINAL, 5, final),
            *((Group(FURTHER, 6, _further(d)),) if d.further else ()),
        )

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        layers = (
            (0,) if group.name in (FINAL, FURTHER) else layers_of(tensors.description, group.name)
        )
        records = [tensors.record(i, group.specs) for i in layers]
        return tables_of(group.name, "layers", records, layers=layers)

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        names = [t.name for t in tables]
        if problem := kind_fault("layers", group, tables):
            return problem
        if group.name in (FINAL, FURTHER):
            whole = names == [f"{group.name}-0"] and tables[0].keys == (0,)
            return "" if whole else f"there is not one record of a table {group.name}-0"
        if problem := keys_fault(d, group.name, tables):
            return problem
        return "there is no table attn-0" if group.name == "attn" and "attn-0" not in names else ""

    def order(
        self, d: Description, tables: Sequence[TableHeader]
    ) -> Iterator[tuple[int, str, int]]:
        """Spread evenly over the depth, so that reading never pauses for long; of a layer, the feed-forward
        first: it is larger. Norms of nested experts before all: who has none cannot be asked early."""
        of_layer: dict[int, list[tuple[str, int]]] = {}
        norms = [t for t in tables if d.is_nested and t.name.startswith("ffn-")]
        yield from ((-1, t.name, i) for t in norms for i in range(len(t.keys)))
        for t in (t for t in tables if t not in norms):
            for i, layer in enumerate(t.keys if t.name not in ("final-0", "further-0") else ()):
                of_layer.setdefault(layer, []).append((t.name, i))
        for layer in sorted(of_layer, key=lambda i: i * GOLDEN % 1):
            yield from ((1, name, i) for name, i in sorted(of_layer[layer], reverse=True))


MIXERS = {
    "attn": "attention",
    DELTA: "delta",
    CONV: "conv",
}  # what the layers of these groups mix tokens by


def layers_of(d: Description, name: str) -> tuple[int, ...]:
    """The layers that have a record in the tables of a group."""
    plain, is_wide = name.removeprefix(WIDE), name.startswith(WIDE)
    if plain in ("attn", SHARING):
        found = set(d.kv_layers)
        found = found if plain == "attn" else set(d.mixed_by("attention")) - found
        return tuple(i for i in sorted(found) if any(d.layers[i].form[:2]) == is_wide)
    if name in MIXERS:
        return d.mixed_by(MIXERS[name])
    routed = set(d.routed)
    found = set(range(d.num_layers)) - routed if name == DENSE or d.mixture is None else routed
    return tuple(i for i in sorted(found) if (d.layers[i].ffn_width > 0) == is_wide)


def _attentions(d: Description) -> Iterator[Group]:
    for name in ("attn", WIDE + "attn", SHARING, WIDE + SHARING):
        if layers := layers_of(d, name):
            specs = _attention(d.of_layer(layers[0]), makes_keys=not name.endswith(SHARING))
            yield Group(name, 2, specs)


def _ffns(d: Description) -> Iterator[Group]:
    if d.mixture is not None:
        yield Group("ffn", 3, _routed(d, d.mixture))
    for name in ("ffn", WIDE + "ffn") if d.mixture is None else (DENSE,):
        if layers := layers_of(d, name):
            yield Group(name, 3, {**_dense(d.of_layer(layers[0])), **layer_end(d)})


def _attention(d: Description, makes_keys: bool = True) -> Specs:
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    parts = (("q", q), ("k", kv), ("v", kv)) if makes_keys else (("q", q),)
    biases = [(f"{name}_bias", rows) for name, rows in parts]
    specs: dict[str, TensorSpec] = dict(norms(d, "attn_norm")) if d.pre_norm else {}
    if d.latent is not None:
        specs |= _latent(d, d.latent)
    else:
        specs["qkv"] = matrix(d.width, *parts)
        specs["o"] = matrix(q, ("o", d.width))
    if d.gated:
        specs["attn_gate"] = matrix(d.width, ("attn_gate", q))
    if d.qkv_bias:
        specs["qkv_bias"] = vector(*biases)
    if d.o_bias:
        specs["o_bias"] = vector(("o_bias", d.width))
    if d.sinks:
        specs["sinks"] = vector(("sinks", d.num_heads))
    if d.qk_norm or d.qk_norm_whole:
        sizes = {"q_norm": d.head_dim, "k_norm": d.head_dim}
        sizes = sizes if d.qk_norm else {"q_norm": q, "k_norm": kv}
        specs |= {n: vector((n, size)) for n, size in sizes.items() if makes_keys or n == "q_norm"}
    if d.post_norm:
        specs["attn_post_norm"] = vector(("attn_post_norm", d.width))
    return specs


def _latent(d: Description, x: Latent) -> Specs:
    """Keys' map is stored turned, head by head, as GGUF files have it."""
    width, queries = x.query_rank or d.width, d.num_heads * (x.key + x.rope)
    specs = {
        "kv_a": matrix(d.width, ("kv_a", x.rank + x.rope)),
        "kv_a_norm": vector(("kv_a_norm", x.rank)),
        "q_b": matrix(width, ("q_b", queries)),
        "k_b": matrix(x.key, ("k_b", d.num_heads * x.rank)),
        "v_b": matrix(x.rank, ("v_b", d.num_heads * x.value)),
        "o": matrix(d.num_heads * x.value, ("o", d.width)),
    }
    if x.query_rank:
        specs["q_a"] = matrix(d.width, ("q_a", x.query_rank))
        specs["q_a_norm"] = vector(("q_a_norm", x.query_rank))
    return specs


def _further(d: Description) -> Specs:
    """What joins a token's embedding with the state before it: norms of either, and a map."""
    return {
        "token_norm": vector(("token_norm", d.width)),
        "state_norm": vector(("state_norm", d.width)),
        "join": matrix(2 * d.width, ("join", d.width)),
    }


def _routed(d: Description, m: Mixture) -> Specs:
    """The router, and an expert that all tokens use; of nested experts the norms alone."""
    if m.nested:
        return ffn_norm(d) | _post_norm(d)
    specs = ffn_norm(d) | {"router": matrix(d.width, ("router", m.count))}
    if m.beside:
        specs |= beside(d, m) | layer_end(d)
    if m.bias:
        specs["router_bias"] = vector(("router_bias", m.count))
    if m.choice_bias:
        specs["choice_bias"] = vector(("choice_bias", m.count))
    if m.shared:
        shared = gated(d, False, "shared_", m.shared)
        specs |= {f"shared_{name}": spec for name, spec in shared.items()}
    if m.shared_gate:
        specs["shared_router"] = vector(("shared_router", d.width))
    return specs


def _post_norm(d: Description) -> dict[str, TensorSpec]:
    return {"ffn_post_norm": vector(("ffn_post_norm", d.width))} if d.post_norm else {}


def _beside_table(d: Description) -> Specs:
    """What of a table of feed-forwards is always in memory: the row of each token, and of each layer what
    makes the model's width of a row's numbers."""
    if d.memory is None or not d.memory.is_table:
        return {}
    specs = {ORDER: vector((ORDER, d.vocab_size))}
    for i, rank in enumerate(d.memory.ranks):
        specs[basis(i)] = matrix(rank, (basis(i), d.width))
    return specs


def basis(layer: int) -> str:
    """The name of a layer's basis."""
    return f"basis_{layer}"


def _memory(d: Description, m: Memory) -> Specs:
    """A feed-forward of the embedding, unless it is looked up; and a dense one beside."""
    specs = {} if m.is_table else ffn_norm(d) | gated(d, False, "", d.ffn_width)
    if m.dense:
        specs[f"{BESIDE}norm"] = vector((f"{BESIDE}norm", d.width))
        inner = gated(d, False, BESIDE, m.dense)
        specs |= {f"{BESIDE}{name}": spec for name, spec in inner.items()}
    return specs


def _dense(d: Description) -> Specs:
    if d.memory is not None:
        return _memory(d, d.memory)
    specs = ffn_norm(d) | (two_matrix(d) if d.two_matrix else gated(d, d.mlp_bias, "", d.ffn_width))
    if d.shard is not None:
        specs["down"] = matrix(d.shard.inner, ("down", d.shard.outer))
    return specs | _post_norm(d)


def gated(d: Description, bias: bool, prefix: str, inner: int) -> dict[str, TensorSpec]:
    """A gated feed-forward, or one expert: gate and up as one matrix, and down."""
    up, down = f"{prefix}up", f"{prefix}down"
    specs = {
        "gate_up": matrix(d.width, (f"{prefix}gate", inner), (up, inner)),
        "down": matrix(inner, (down, d.width)),
    }
    if bias:
        specs["gate_up_bias"] = vector((f"{prefix}gate_bias", inner), (f"{up}_bias", inner))
        specs["down_bias"] = vector((f"{down}_bias", d.width))
    return specs


def tables_of(
    name: str,
    kind: str,
    records: Sequence[Record],
    each: int = 1,
    layers: Sequence[int] | None = None,
) -> list[TablePlan]:
    """Records of one shape make one table, since its records are equally long. `each`: records of a layer,
    which stay together; `layers`: whose they are, by default all. Raises UnsupportedError."""
    of = range(len(records) // each) if layers is None else layers
    groups: dict[tuple[object, ...], list[int]] = {}
    for first in range(0, len(records), each):
        layer = range(first, first + each)
        shapes = {_shape(records[i]) for i in layer}
        if len(shapes) > 1:
            raise UnsupportedError(f"{name} {first // each}: experts of several types in one layer")
        groups.setdefault(shapes.pop(), []).extend(layer)
    plans = []
    for number, keys in enumerate(groups.values()):
        matrices = {
            k: tuple(Matrix(p.encoding, p.num_rows, p.width, 0) for p in pieces)
            for k, pieces in records[keys[0]].items()
        }
        layout, stride = lay_out(matrices)
        named = tuple(of[i // each] * each + i % each for i in keys)
        header = TableHeader(f"{name}-{number}", kind, named, stride, layout, ())
        plans.append(TablePlan(header, tuple(records[i] for i in keys)))
    return plans


def _shape(record: Record) -> tuple[object, ...]:
    return tuple((k, p.encoding, p.num_rows) for k, ps in record.items() for p in ps)


def kind_fault(kind: str, group: Group, tables: Sequence[TableHeader]) -> str:
    """Are the tables of this kind, their records sound?"""
    for table in tables:
        if table.kind != kind or table.num_rows:
            return f"table {table.name} is of kind {table.kind[:80]!r}, {kind!r} is due"
        if problem := record_fault(table, group.specs):
            return f"table {table.name}: {problem}"
    return ""


def keys_fault(d: Description, name: str, tables: Sequence[TableHeader], each: int = 1) -> str:
    """Is every layer in one table, with all its `each` records in order?"""
    layers = [k // each for table in tables for k in table.keys[::each]]
    whole = all(
        table.keys[at : at + each] == tuple(range(table.keys[at], table.keys[at] + each))
        and table.keys[at] % each == 0
        for table in tables
        for at in range(0, len(table.keys), each)
    )
    due = layers_of(d, name)
    if whole and sorted(layers) == list(due):
        return ""
    return f"the tables of {name!r} do not hold each of {len(due):,} layers once"


KIND = Layers()
