"""The add-on file that says which neurons of a pack to compute: thresholds and predictors by layer, in
safetensors, with what they were measured to cost. `outsize adapt sparsity` writes it. Hostile until
proven; refused for another pack than it was made for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.checkpoint.lora import Stored
from outsize.encoding.find import ENCODINGS
from outsize.errors import AdapterError, UnsupportedError
from outsize.pack.add_on import AddOn, printable, shape_fault
from outsize.pack.tables import Matrix, field_bytes

KIND, VERSION = "neurons", 1
THRESHOLDS, FIRING, GAPS = "thresholds", "firing", "gaps"
IMPORTANCE, CHUNKS = CHOICES = ("importance", "chunks")  # how bundles are chosen by their scores
MOST_GAP = 1e6
SUFFIX = ".neurons.safetensors"
ORDER, PREDICTOR = re.compile(r"(?:[0-9a-f]{12})?"), re.compile(r"[a-z]+(?::[a-z0-9]{1,9})?")
MOST_ROWS = 1 << 24
ADD_ON = AddOn(
    KIND, VERSION, "neurons", "outsize adapt sparsity", "outsize adapt sparsity MODEL --data FILE"
)


@dataclass(frozen=True, slots=True)
class NeuronAbout:
    """What a file says of itself."""

    kind: str
    version: int
    identity: str  # of the pack: all that decides an answer
    layout: str  # of the pack's records
    order: str  # of neurons: a digest, or "" for their own
    bundle: int  # neurons of a bundle
    count: int  # bundles of a layer
    predictor: str  # as `svd:64`
    exact: bool  # does the predictor miss nothing?
    share: float  # of the bundles, as asked for
    fires: float  # of the bundles, as measured
    missed: float  # of those that were worth computing, as measured
    matrices: Mapping[str, Matrix]  # of the predictors, by layer and name: 3.a
    vectors: Mapping[str, int]  # lengths, likewise
    tokens: int = 0  # that the cost was measured on; 0: not yet
    perplexity_before: float = 0.0
    perplexity: float = 0.0
    text: str = ""
    choose: str = IMPORTANCE
    gap: float = 0.0  # what beginning a read costs, in bundles that are read along
    runs: float = (
        0.0  # of neighbours that a layer computes for a token, as measured: reads; 0: not yet
    )

    @property
    def cost(self) -> str:
        """What it costs, in words: nothing where no neuron is missed, and none was re-encoded to be
        reordered."""
        if self.exact and not self.order:
            return "exact"
        if not self.tokens:
            return "lossy: not measured"
        return (
            f"lossy: perplexity {self.perplexity_before:,.2f} -> {self.perplexity:,.2f} "
            f"({self.tokens:,} tokens of {printable(self.text)})"
        )

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NeuronFile:
    """An add-on file: what it says, and its tensors, read when they are asked for."""

    path: Path
    about: NeuronAbout
    tensors: Stored

    def numbers(self, name: str) -> Tensor:
        """An fp32 tensor. Raises AdapterError if numbers in it are none."""
        found = self.tensors[name].float()
        if not bool(torch.isfinite(found).all()):
            raise ADD_ON.damaged(self.path, f"{name} has numbers that are not finite")
        return found

    def layer(self, layer: int) -> Iterator[tuple[str, Matrix, dict[str, Tensor]]]:
        """The predictor's matrices of a layer, with their stored fields."""
        prefix = f"{layer}."
        for name, matrix in self.about.matrices.items():
            if name.startswith(prefix):
                fields = {
                    field: self._bytes(f"{name}.{field}").view(spec.dtype).view(spec.shape)
                    for field, spec in matrix.specs.items()
                }
                yield name.removeprefix(prefix), matrix, fields

    def _bytes(self, name: str) -> Tensor:
        """A field as it is stored. Raises AdapterError."""
        found = self.tensors[name]
        if found.dtype is not torch.int8:
            raise ADD_ON.damaged(self.path, f"{name} is not in bytes")
        return found

    @property
    def size(self) -> int:
        """Bytes of predictors in memory."""
        matrices = sum(m.size for m in self.about.matrices.values())
        return matrices + 4 * sum(self.about.vectors.values())


def stored(matrix: Matrix, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A matrix's fields as the file keeps them: bytes."""
    return {f: fields[f].contiguous().view(-1).view(torch.int8) for f in matrix.specs}


def read(path: Path, num_layers: int) -> NeuronFile:
    """Raises AdapterError for what is no such file, or is damaged."""
    tensors, about = ADD_ON.read(path, NeuronAbout)
    if problem := _fault(about, tensors, num_layers):
        raise ADD_ON.damaged(path, problem)
    return NeuronFile(path, about, tensors)


def check_pack(file: NeuronFile, identity: str, layout: str, name: str) -> None:
    """Raise AdapterError for another pack than the file was made for."""
    if (file.about.identity, file.about.layout) != (identity, layout):
        raise AdapterError(
            f"{file.path} is for another pack than {name}: thresholds and predictors are of its very "
            "numbers; make one with `outsize adapt sparsity`"
        )


def _fault(about: NeuronAbout, tensors: Stored, num_layers: int) -> str:
    """What is wrong with a file, in a clause; "" if nothing is."""
    if not 0 < about.bundle <= 1 << 16 or not 0 < about.count <= 1 << 20:
        return f"it has {about.count:,} bundles of {about.bundle:,} neurons"
    if not all(0 <= s <= 1 for s in (about.share, about.fires, about.missed)):
        return "a share in it is not from 0 to 1"
    if about.choose not in CHOICES:
        return f"it chooses by {about.choose[:20]!r}; known are {', '.join(CHOICES)}"
    if not (0 <= about.gap <= MOST_GAP and 0 <= about.runs <= about.count):
        return f"it says {about.gap} of gaps and {about.runs} of runs"
    if not ORDER.fullmatch(about.order) or not PREDICTOR.fullmatch(about.predictor):
        return f"it says {about.predictor[:20]!r} of predictors and {about.order[:20]!r} of order"
    due: dict[str, tuple[int, ...]] = {n: (length,) for n, length in about.vectors.items()}
    try:
        for name, m in about.matrices.items():
            if (
                m.encoding not in ENCODINGS
                or not 0 < m.num_rows <= MOST_ROWS
                or not 0 < m.width <= MOST_ROWS
            ):
                return f"matrix {name[:40]!r} is of no known encoding and size"
            due |= {f"{name}.{f}": (field_bytes(spec),) for f, spec in m.specs.items()}
    except UnsupportedError as e:
        return str(e)
    due |= {THRESHOLDS: (num_layers,), FIRING: (num_layers, about.count)}
    due |= {GAPS: (num_layers,)} if about.choose == CHUNKS else {}
    return shape_fault(due, tensors)
