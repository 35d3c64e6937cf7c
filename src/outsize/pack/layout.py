"""What a pack of a checkpoint will hold, worked out from headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.checkpoint.checkpoint import Checkpoint, Tensor
from outsize.errors import CheckpointError, UnsupportedError
from outsize.model_config import Description, Recipe
from outsize.pack.format import PAGE, Matrix, TableHeader, aligned
from outsize.pack.parts import LOSSY, Part, Piece, Record, TablePlan, encoding_for
from outsize.pack.strangers import missing, refuse_strangers

ROW_RECORD = 2 << 20  # bytes of a record of an embedding or head


class Planner:
    """Finds and checks every tensor that a recipe names."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> None:
        self.tensors, self.recipe = checkpoint.tensors, recipe
        self.wanted, self.grouped = wanted, grouped
        self.description = recipe.description
        self.used: set[str] = set()  # names of tensors

    def tensor(
        self, name: str, layer: int, shape: tuple[int, ...], expert: int | None = None
    ) -> Tensor:
        """One tensor of a layer; of an expert, by its own name or out of the stack of all."""
        foreign = self.recipe.names[name].replace("{i}", str(layer))
        if expert is not None and "{e}" in foreign:
            foreign = foreign.replace("{e}", str(expert))
        elif expert is not None:
            assert self.description.mixture is not None
            stack = self.tensor(name, layer, (self.description.mixture.count, *shape))
            return _unstack(stack, expert)
        found = self.tensors.get(foreign)
        if found is None:
            raise missing(foreign, self.tensors, self.recipe)
        self.used.add(foreign)
        if found.shape != shape:
            raise CheckpointError(f"tensor {foreign!r} has shape {found.shape}, not {shape}")
        return found

    def matrix(
        self, layer: int, *names: tuple[str, int, int], expert: int | None = None
    ) -> tuple[Piece, ...]:
        """Matrices (name, rows, width) stacked, those of one encoding as one."""
        pieces: list[Piece] = []
        for name, num_rows, width in names:
            tensor = self.tensor(name, layer, (num_rows, width), expert)
            part = Part(tensor, self.head_dim(name))
            encoding = encoding_for(tensor, self.wanted, self.grouped)
            if pieces and pieces[-1].encoding == encoding:
                pieces[-1] = Piece(encoding, (*pieces[-1].parts, part))
            else:
                pieces.append(Piece(encoding, (part,)))
        return tuple(pieces)

    def vector(
        self, layer: int, *names: tuple[str, int], expert: int | None = None
    ) -> tuple[Piece, ...]:
        """Vectors (name, length), kept in fp32: one row if there is one, else joined end to end."""
        parts = []
        for name, length in names:
            shift = self.recipe.norm_shift if name.endswith("norm") else 0.0
            tensor = self.tensor(name, layer, (length,), expert)
            encoding_for(tensor, self.wanted, self.grouped)
            parts.append(Part(tensor, self.head_dim(name.split("_")[0]), shift))
        return tuple(Piece("fp32", (part,)) for part in parts)

    def head_dim(self, name: str) -> int:
        halves = name in ("q", "k") and not self.recipe.interleaved
        return self.description.head_dim if halves else 0

    def attention(self, i: int) -> Record:
        d = self.description
        q_rows, kv_rows = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
        record = {
            "attn_norm": self.vector(i, ("attn_norm", d.width)),
            "qkv": self.matrix(
                i, ("q", q_rows, d.width), ("k", kv_rows, d.width), ("v", kv_rows, d.width)
            ),
            "o": self.matrix(i, ("o", d.width, q_rows)),
        }
        if d.qkv_bias:
            biases = ("q_bias", q_rows), ("k_bias", kv_rows), ("v_bias", kv_rows)
            record["qkv_bias"] = self.vector(i, *biases)
        if d.o_bias:
            record["o_bias"] = self.vector(i, ("o_bias", d.width))
        if d.sinks:
            record["sinks"] = self.vector(i, ("sinks", d.num_heads))
        if d.qk_norm_whole:
            record["q_norm"] = self.vector(i, ("q_norm", q_rows))
            record["k_norm"] = self.vector(i, ("k_norm", kv_rows))
        if d.qk_norm:
            record["q_norm"] = self.vector(i, ("q_norm", d.head_dim))
            record["k_norm"] = self.vector(i, ("k_norm", d.head_dim))
        if d.post_norm:
            record["attn_post_norm"] = self.vector(i, ("attn_post_norm", d.width))
        return record

    def feed_forward(self, i: int) -> Record:
        d = self.description
        if d.mixture is not None:
            router = self.tensor("router", i, (d.mixture.count, d.width))
            record = {
                "ffn_norm": self.vector(i, ("ffn_norm", d.width)),
                "router": (Piece("fp32", (Part(router),)),),
            }
            if d.mixture.bias:
                record["router_bias"] = self.vector(i, ("router_bias", d.mixture.count))
            return record
        record = {
            "ffn_norm": self.vector(i, ("ffn_norm", d.width)),
            "gate_up": self.matrix(i, ("gate", d.ffn_width, d.width), ("up", d.ffn_width, d.width)),
            "down": self.matrix(i, ("down", d.width, d.ffn_width)),
        }
        if d.mlp_bias:
            ups = ("gate_bias", d.ffn_width), ("up_bias", d.ffn_width)
            record["gate_up_bias"] = self.vector(i, *ups)
            record["down_bias"] = self.vector(i, ("down_bias", d.width))
        if d.post_norm:
            record["ffn_post_norm"] = self.vector(i, ("ffn_post_norm", d.width))
        return record

    def expert(self, i: int, e: int) -> Record:
        """Everything of one expert together: it is used whole or not at all."""
        width, inner = self.description.width, self.description.ffn_width
        if self.recipe.paired:
            return self._paired(i, e)
        up: tuple[tuple[str, int, int], ...]
        up = ("expert_gate", inner, width), ("expert_up", inner, width)
        if "expert_gate_up" in self.recipe.names:
            up = (("expert_gate_up", 2 * inner, width),)
        record = {
            "gate_up": self.matrix(i, *up, expert=e),
            "down": self.matrix(i, ("expert_down", width, inner), expert=e),
        }
        if self.description.mixture is not None and self.description.mixture.bias:
            ups = ("expert_gate_bias", inner), ("expert_up_bias", inner)
            record["gate_up_bias"] = self.vector(i, *ups, expert=e)
            record["down_bias"] = self.vector(i, ("expert_down_bias", width), expert=e)
        return record

    def _paired(self, i: int, e: int) -> Record:
        """An expert whose gate and up lie row by row in one tensor; transposed, if it is not in MXFP4."""
        width, inner = self.description.width, self.description.ffn_width
        name = self.recipe.names["expert_gate_up"].replace("{i}", str(i))
        turned = name not in self.tensors or self.tensors[name].kind.name != "MXFP4"
        way = -1 if turned else 1
        both = self.tensor("expert_gate_up", i, (2 * inner, width)[::way], e)
        down = self.tensor("expert_down", i, (width, inner)[::way], e)
        bias = self.tensor("expert_gate_up_bias", i, (2 * inner,), e)
        halves = tuple(Part(both, transposed=turned, first=k, step=2) for k in (0, 1))
        encodings = [encoding_for(t, self.wanted, self.grouped) for t in (both, down)]
        return {
            "gate_up": (Piece(encodings[0], halves),),
            "down": (Piece(encodings[1], (Part(down, transposed=turned),)),),
            "gate_up_bias": tuple(Piece("fp32", (Part(bias, first=k, step=2),)) for k in (0, 1)),
            "down_bias": self.vector(i, ("expert_down_bias", width), expert=e),
        }

    def rows(self, name: str) -> TablePlan:
        """The table of an embedding or head, in records of about ROW_RECORD bytes."""
        d = self.description
        tensor = self.tensor(name, 0, (d.vocab_size, d.width))
        wanted = self.wanted
        if wanted == "int4":  # a head in 4 bits costs more than it saves
            wanted = "group8" if self.grouped and d.width % 64 == 0 else "int8"
        encoding = encoding_for(tensor, wanted, self.grouped)
        block = rows_per_record(encoding, d)
        starts = range(0, d.vocab_size, block)
        records: list[Record] = [
            {name: (Piece(encoding, (Part(slice_rows(tensor, s, s + block)),)),)} for s in starts
        ]
        layout, stride = lay_out({name: (Matrix(encoding, block, d.width, 0),)})
        header = TableHeader(name, "rows", tuple(starts), stride, layout, (), d.vocab_size)
        return TablePlan(header, tuple(records))


def _unstack(stack: Tensor, index: int) -> Tensor:
    """One of the equal tensors that a stacked one is made of."""
    size = stack.size // stack.shape[0]
    name, offset = f"{stack.name}[{index}]", stack.offset + index * size
    scales = None if stack.scales is None else _unstack(stack.scales, index)
    return Tensor(name, stack.kind, stack.shape[1:], stack.path, offset, size, scales)


def rows_per_record(encoding: str, d: Description) -> int:
    size = Matrix(encoding, 64, d.width, 0).size
    return min(max(1, ROW_RECORD // size) * 64, aligned(d.vocab_size, 64))


def slice_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of a matrix (fewer at its end), as a tensor of their own."""
    num_rows, width = tensor.shape
    stop, row_bytes = min(stop, num_rows), tensor.size // num_rows
    shape, offset = (stop - start, width), tensor.offset + start * row_bytes
    return Tensor(tensor.name, tensor.kind, shape, tensor.path, offset, (stop - start) * row_bytes)


def lay_out(tensors: dict[str, tuple[Matrix, ...]]) -> tuple[dict[str, tuple[Matrix, ...]], int]:
    """Give every matrix its offset in the record; the record's stride."""
    out, at = {}, 0
    for name, matrices in tensors.items():
        placed = []
        for m in matrices:
            placed.append(Matrix(m.encoding, m.num_rows, m.width, at))
            at += m.size
        out[name] = tuple(placed)
    return out, aligned(at, PAGE)


def _layer_tables(
    name: str, records: Sequence[Record], kind: str = "layers", each: int = 1
) -> list[TablePlan]:
    """Records of one shape make one table, since its records are equally long. `each`: records of a
    layer, which stay together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for first in range(0, len(records), each):
        layer = range(first, first + each)
        shapes = {_shape(records[i]) for i in layer}
        if len(shapes) > 1:
            raise UnsupportedError(f"{name} {first // each}: experts of several types in one layer")
        groups.setdefault(shapes.pop(), []).extend(layer)
    plans = []
    for number, layers in enumerate(groups.values()):
        matrices = {
            k: tuple(Matrix(p.encoding, p.num_rows, p.width, 0) for p in pieces)
            for k, pieces in records[layers[0]].items()
        }
        layout, stride = lay_out(matrices)
        header = TableHeader(f"{name}-{number}", kind, tuple(layers), stride, layout, ())
        plans.append(TablePlan(header, tuple(records[i] for i in layers)))
    return plans


def _shape(record: Record) -> tuple[object, ...]:
    return tuple((k, p.encoding, p.num_rows) for k, ps in record.items() for p in ps)


def plan(checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> list[TablePlan]:
    """Every table of the pack. Reads nothing. Raises CheckpointError, UnsupportedError."""
    p, d = Planner(checkpoint, recipe, wanted, grouped), recipe.description
    tables = [p.rows("embed")] + ([] if d.tied else [p.rows("head")])
    tables += _layer_tables("attn", [p.attention(i) for i in range(d.num_layers)])
    tables += _layer_tables("ffn", [p.feed_forward(i) for i in range(d.num_layers)])
    if d.mixture is not None:
        count = d.mixture.count
        experts = [p.expert(i, e) for i in range(d.num_layers) for e in range(count)]
        tables += _layer_tables("experts", experts, "experts", count)
    tables += _layer_tables("final", [{"final_norm": p.vector(0, ("final_norm", d.width))}])
    refuse_strangers(checkpoint.tensors, p.used, recipe)
    return tables


def lossy_tensors(tables: Sequence[TablePlan]) -> list[str]:
    """Tensors that are re-encoded in fewer levels than they have."""
    parts = (p for t in tables for r in t.records for ps in r.values() for x in ps for p in x.parts)
    return [part.tensor.name for part in parts if part.tensor.kind.name in LOSSY]
