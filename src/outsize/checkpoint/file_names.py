"""What the name of a model's file says: quantization, part of a split model, piece of a cut file, or no
model at all."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from outsize.errors import CheckpointError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)", re.DOTALL)
MAX_PARTS = 1024
# Files beside safetensors that decide what goes in and what comes out (the last: how the weights of older
# quantized checkpoints are stored), and a folder of templates.
SIDECARS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "quantize_config.json", "quant_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"
# The last of these in a name is its quantization: Q4_K_M, UD-Q4_K_XL, i1-IQ2_XXS, BF16, MXFP4_MOE.
QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])(?:(UD|i\d)[-_.])?"
    r"(I?Q\d_(?:K(?:_[A-Z]{1,3})?|\d(?:_\d_\d)?|[A-Z]{1,3})|TQ\d_\d|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
NEVER = re.compile(r"(?:^|[-_./])(?:mmproj|ggml-vocab|vocab-only)|(?:^|/)imatrix", re.IGNORECASE)
RARELY = re.compile(
    r"(?:^|[-_./])(?:mtp|draft|drafter|eagle\d?|lora|qlora|adapter)(?=[-_./])", re.IGNORECASE
)
# A file cut by bytes: x.gguf.part1of2, x.gguf-split-a, x.gguf.part-00001, x.gguf.00001, x.gguf.aa
CUT = re.compile(
    r"(.+\.(?:gguf|safetensors))[-._]"
    r"(?:(?:part|split|chunk)[-._]?(?:\d+|[a-z]{1,2})(?:[-._]?of[-._]?\d+)?|\d+of\d+|\d{2,5}|a[a-z])",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a GGUF's name says that it is quantized; both are upper case, or empty."""

    prefix: str  # UD (unsloth's dynamic) or I1 (with an importance matrix)
    tag: str  # Q4_K_M and the like


def folder_and_file(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    return folder, file


def quantization(name: str) -> Quantization:
    """Of a file's name, else of its folder's."""
    for part in reversed(PurePosixPath(name).parts):
        matches = QUANTIZATION.findall(part)
        if matches:
            prefix, tag = (text.upper() for text in matches[-1])
            return Quantization(prefix, re.sub(r"^FP(?=\d)", "F", tag))
    return Quantization("", "")


def base_name(name: str) -> str:
    """A file's name without quantization, part number and suffix: equal for the files of one model."""
    part = PART.fullmatch(PurePosixPath(name).name)
    stem = (
        part[1] if part else re.sub(r"\.gguf$", "", PurePosixPath(name).name, flags=re.IGNORECASE)
    )
    bare = re.sub(r"imat(?:rix)?", "", QUANTIZATION.sub("", stem), flags=re.IGNORECASE)
    return re.sub(r"[-_.\s]+", "-", bare).strip("-").lower()


def parts_of(name: str) -> list[str]:
    """All parts of the split model that a file belongs to, in order; just `name` for a whole one."""
    match = PART.fullmatch(name)
    if not match:
        return [name]
    stem, _, count, suffix = match.groups()
    if not 1 <= int(count) <= MAX_PARTS:
        raise CheckpointError(
            f"{name}: a model of {int(count)} parts; 1 to {MAX_PARTS} are allowed"
        )
    return [f"{stem}-{i + 1:05}-of-{count}{suffix}" for i in range(int(count))]


def is_shadow(name: str) -> bool:
    """A file that macOS keeps beside another on disks that are not its own."""
    return name.rsplit("/", 1)[-1].startswith("._")


def is_template(name: str) -> bool:
    """One of several chat templates, in a folder of their own."""
    return folder_and_file(name)[0] == MORE_TEMPLATES and name.endswith(".jinja")


def is_never_a_model(name: str) -> bool:
    """A vision projector, a vocabulary, or an importance matrix (whose name states no quantization)."""
    matrix = "imatrix" in name.lower() and not QUANTIZATION.search(name)
    return matrix or NEVER.search(name) is not None


def is_rarely_a_model(name: str) -> bool:
    """A draft, an MTP head or an adapter, unless its whole repository is called so."""
    return RARELY.search(name) is not None


def _cut_from(name: str) -> str:
    match = CUT.fullmatch(name)
    return match[1] if match else ""


def cut_files(name: str, names: Iterable[str]) -> list[str]:
    """If `name` is a piece of a file that was cut by bytes: all of its pieces among `names`, in order."""
    whole = _cut_from(name)
    if not whole:
        return []
    pieces = {name} | {n for n in names if _cut_from(n) == whole}
    return sorted(
        pieces, key=lambda n: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", n)]
    )


def join_command(pieces: list[str]) -> str:
    """The shell command that makes one file of pieces."""
    whole = PurePosixPath(_cut_from(pieces[0])).name
    return f"cat {shlex.join(pieces)} > {shlex.quote(whole)}"
