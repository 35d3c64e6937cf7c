"""Adapter files: safetensors with low-rank factors, ours or in PEFT's form. Hostile until proven.

PEFT: a folder with adapter_config.json and adapter_model.safetensors, or the latter with the former beside
it; names like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight. Its query and key rows rotate
in halves; ours in adjacent pairs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from outsize.checkpoint import checkpoint, safetensors
from outsize.checkpoint.bounded import open_regular, read_regular, regular_size
from outsize.checkpoint.read_json import loads
from outsize.errors import AdapterError, CheckpointError

FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
)  # in PEFT's form; ours is the first alone
KEY = "outsize"  # of our files' metadata: JSON
LIMIT = 1 << 32  # bytes of a file
MAX_HEADER, MAX_CONFIG = 8 << 20, 1 << 20  # bytes; a large adapter's header has 300,000
MOST_ALPHA = 1 << 32
MOST_SCALE = 1 << 16  # of alpha / rank; files of the hub have .1 to 64
PEFT_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_(A|B)\.weight"
)


TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
Shape = tuple[int, ...]


class Stored(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for and not kept: a file of any size takes the memory of
    one tensor."""

    def __init__(self, tensors: Mapping[str, checkpoint.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """Raises AdapterError."""
        t = self._tensors[name]
        try:
            with open_regular(t.path) as file:
                data = bytearray(checkpoint.pread(file, t.offset, t.size, name))
        except (OSError, CheckpointError) as e:
            raise AdapterError(f"{t.path} cannot be read ({e})") from None
        kind = TYPES[t.kind.name]
        return (
            torch.frombuffer(data, dtype=kind).view(t.shape)
            if data
            else torch.zeros(t.shape, dtype=kind, device="cpu")
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shapes(self) -> dict[str, Shape]:
        """Of all tensors: none is read."""
        return {name: t.shape for name, t in self._tensors.items()}

    def renamed(self, names: Mapping[str, str]) -> Stored:
        """The same under other names: from ours to the file's."""
        return Stored({ours: self._tensors[theirs] for ours, theirs in names.items()})


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What a file holds: tensors by our names ("0.q.A"), and what it says of itself."""

    path: Path
    tensors: Stored
    about: Mapping[str, object]

    def factors(self) -> dict[str, tuple[Shape, Shape]]:
        """The shapes of A and B of each projection. Raises AdapterError if one lacks the other, or they do
        not multiply."""
        shapes = self.tensors.shapes()
        names = sorted({n[:-2] for n in shapes if n.endswith((".A", ".B"))})
        missing = [n for n in names if not {f"{n}.A", f"{n}.B"} <= shapes.keys()]
        if missing:
            raise AdapterError(
                f"{self.path}: {missing[0]} has one factor of two; the file is damaged"
            )
        out = {n: (shapes[f"{n}.A"], shapes[f"{n}.B"]) for n in names}
        for name, (a, b) in out.items():
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0] * a[1] * b[0]:
                raise AdapterError(
                    f"{self.path}: {name} has factors {b} x {a}, which do not multiply; the file is "
                    "damaged"
                )
        return out

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by. Raises AdapterError."""
        return _sound_scale(self.path, self.about.get("scale", 1.0))


def load(path: Path) -> AdapterFile:
    """Any adapter file. Raises AdapterError."""
    file = _file(path)
    tensors, about = raw(file)
    if about:
        return AdapterFile(file, tensors, about)
    return _peft(file, tensors)


def _file(path: Path) -> Path:
    """Of a folder in PEFT's form, the one with the factors."""
    return path / FILES[0] if path.is_dir() else path


def files(path: Path) -> list[tuple[str, bytes]]:
    """What an adapter consists of, by the names of FILES. Raises AdapterError."""
    found = [(FILES[0], _file(path))]
    if not raw(_file(path))[1]:
        found.append((FILES[1], _file(path).with_name(FILES[1])))
    return [(name, read_regular(file, LIMIT, AdapterError)) for name, file in found]


def raw(path: Path) -> tuple[Stored, dict[str, object]]:
    """Tensors, and what our metadata says: of the file only the header is read. Raises AdapterError."""
    if (size := regular_size(path, AdapterError)) > LIMIT:
        raise AdapterError(f"{path} has {size:,} bytes; no adapter is that large")
    try:
        said, data, size = safetensors.header(path, MAX_HEADER)
        told = said.get(safetensors.METADATA) or {}
        about = loads(str(told.get(KEY, "{}"))) if isinstance(told, dict) else None
        tensors = Stored(safetensors.tensors_of(path, said, data, size))
    except AdapterError:
        raise
    except (OSError, CheckpointError, ValueError, TypeError) as e:
        raise AdapterError(f"{path} is not a readable safetensors file ({e})") from None
    if not isinstance(about, dict):
        raise AdapterError(f"{path} says nothing readable about itself; train it again")
    return tensors, cast("dict[str, object]", about)


def _peft(path: Path, tensors: Stored) -> AdapterFile:
    config = _config(path.with_name(FILES[1]))
    out: dict[str, str] = {}
    for name in tensors:
        match = PEFT_NAME.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{path}: {name} is not a low-rank factor of a projection; only LoRA of attention and "
                "feed-forward maps can be loaded"
            )
        layer, part, factor = match.groups()
        out[f"{layer}.{part}.{factor}"] = name
    if not out:
        raise AdapterError(f"{path} holds no tensors; it is not an adapter")
    about = {"scale": _scale(path, config), "rows": "halves"}
    about |= {"base_name": config.get("base_model_name_or_path")}
    return AdapterFile(path, tensors.renamed(out), about)


def _config(path: Path) -> dict[str, object]:
    if not os.path.lexists(path):
        raise AdapterError(f"{path} is not there; PEFT's adapters have one")
    raw = read_regular(path, MAX_CONFIG, AdapterError)
    try:
        config = loads(raw)
    except ValueError as e:
        raise AdapterError(f"{path} cannot be read ({e}); PEFT's adapters have one") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter; other kinds are not known")
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise AdapterError(
                f"{path}: {key} is not known; merge this adapter into its base instead"
            )
    return config


def _scale(path: Path, config: Mapping[str, object]) -> float:
    alpha, rank = config.get("lora_alpha"), config.get("r")
    sound = isinstance(alpha, int | float) and isinstance(rank, int)
    if (
        not sound
        or not 0 < cast(int, rank) <= MOST_SCALE
        or not abs(cast(float, alpha)) <= MOST_ALPHA
    ):
        raise AdapterError(
            f"{path}: its config has lora_alpha {str(alpha)[:40]} and r {str(rank)[:40]}; numbers are due, r "
            f"from 1 to {MOST_SCALE:,}"
        )
    by = cast(int, rank) ** 0.5 if config.get("use_rslora") else cast(int, rank)
    return _sound_scale(path, cast(float, alpha) / by)


def _sound_scale(path: Path, value: object) -> float:
    """Raises AdapterError for what is no number, or makes numbers that are none."""
    if not isinstance(value, int | float) or not abs(value) <= MOST_SCALE:
        raise AdapterError(
            f"{path}: its factors are to be multiplied by {str(value)[:40]}; a number up to "
            f"{MOST_SCALE:,} is expected"
        )
    return float(value)


def adjacent(b_NR: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key map whose heads rotate in halves -> in adjacent pairs."""
    heads: Tensor = b_NR.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).reshape(b_NR.shape).contiguous()


class Factors(Mapping[str, tuple[Tensor, Tensor]]):
    """A and B of each projection ("0.q"), with query and key rows as the engine rotates them; each read when
    it is asked for. Raises AdapterError."""

    def __init__(self, file: AdapterFile, head_dim: int) -> None:
        self.shapes = file.factors()  # of A and B
        self._file = file
        halves = file.about.get("rows") == "halves"
        self._head_dim = head_dim if halves else 0
        for name, (_, b) in self.shapes.items():
            if self._is_turned(name) and b[0] % head_dim:
                raise AdapterError(f"{file.path}: {name} has {b[0]} rows, which no heads have")

    def _is_turned(self, name: str) -> bool:
        return self._head_dim > 0 and name.endswith((".q", ".k"))

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = (self._file.tensors[f"{name}.{factor}"] for factor in "AB")
        return a, adjacent(b, self._head_dim) if self._is_turned(name) else b

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def same_base(file: AdapterFile, base: str, name: str, kin: Sequence[str] = ()) -> None:
    """Raises AdapterError if the file says that it belongs to another model. `kin`: models whose numbers this
    one's were made from, where what was trained for them will do."""
    told = file.about.get("base")
    if told is not None and told not in (base, *kin):
        raise AdapterError(
            f"{file.path} was trained for another model (base {str(told)[:12]}, {name} is {base[:12]}); "
            "train one for this model"
        )


def file_bytes(path: Path) -> int:
    """Its size. Raises AdapterError."""
    return regular_size(_file(path), AdapterError)


def finite(file: AdapterFile, names: Iterable[str]) -> None:
    """Raises AdapterError for numbers that are none, in these tensors; what else a file holds is not read."""
    for name in names:
        tensor = file.tensors[name]
        good = tensor.is_floating_point()
        # A sum is quick, and none where a number is none; but large numbers may add up to none, too.
        if good and not math.isfinite(float(tensor.float().sum())):
            good = bool(torch.isfinite(tensor.float()).all())
        if not good:
            raise AdapterError(f"{file.path}: {name} holds no finite numbers; train it again")
