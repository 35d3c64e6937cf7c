"""The prefix cache that a model is opened with: where it keeps prompts, how many, what they are bound to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from outsize.engine.prefixes import Prefixes
from outsize.errors import OptionError
from outsize.kernels.build import processor
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.options import LoadOptions
from outsize.pack.format import HEADER, Pack
from outsize.pack.outline import of_pack
from outsize.plan.fixed import token_bytes
from outsize.plan.placement import Placement
from outsize.prefix import folder
from outsize.prefix.disk import DiskBlocks
from outsize.prefix.spec import PrefixSpec, parse_prefix
from outsize.weights.spec import parse_experts

COMPUTING = ("kernels", "encoding", "kv", "model", "forward")  # folders of this package
SHARED_CHUNK = 256  # tokens of a prompt computed at once, where prompts are to share much
SHARE = 0.125  # of the budget, that prompts may take in memory; one context in any case


@dataclass(frozen=True, slots=True)
class Checked:
    """Where prompts are kept, once it is known that it can be."""

    spec: PrefixSpec
    folder: Path | None = None
    size: int = 0  # bytes on disk at most
    is_writable: bool = False


def check(options: LoadOptions) -> Checked:
    """What the options ask for, before anything is read. Raises OptionError."""
    lossy = parse_experts(options.experts or "").lossy
    is_asked = options.prefix_cache not in (None, "off")
    if lossy and is_asked and "prefix_cache" not in options.defaults:
        raise OptionError(
            f"prefix_cache is {options.prefix_cache!r}, and {lossy} makes of one prompt other keys and "
            "values each time, which are not kept; leave one of them out"
        )
    if lossy:
        return Checked(PrefixSpec("off"))
    spec = parse_prefix(options.prefix_cache)
    return Checked(spec, *folder.prepare(spec)) if spec.kind == "disk" else Checked(spec)


def make(
    checked: Checked,
    made: Pack,
    placement: Placement,
    model: Transformer,
    known: dict[str, Adapter],
) -> Prefixes | None:
    """The cache; None where nothing is to be kept, or can be: states, and entries of several sizes, are no
    blocks. `known`: adapters by name, as they are when asked for."""
    d = made.description
    if checked.spec.kind == "off" or d.has_states or not d.is_even:
        return None
    most = int(SHARE * placement.budget) // token_bytes(of_pack(made))
    tokens = min(placement.kv_tokens, max(placement.context, most))
    disk = None
    if checked.folder is not None:
        writes = checked.spec.writes
        disk = DiskBlocks(checked.folder, checked.size, writes, checked.is_writable)
    base = _base(made, model) if disk is not None else {}
    if model.description.ropes != made.description.ropes:  # a run of another context has another
        base |= {"ropes": repr(model.description.ropes)}

    def ties(adapter: str | None) -> dict[str, object]:
        digest = None if adapter is None else known[adapter].digest
        return base | {"adapter": digest, "threads": torch.get_num_threads()}

    return Prefixes(model.chunk, tokens, disk, ties, model.backend)


def _base(made: Pack, model: Transformer) -> dict[str, object]:
    """What keys and values depend on beside tokens, adapters and threads, for other processes: all weights,
    by the pack's header with its checksums; and what computes, since another sums in another order."""
    return {
        "pack": hashlib.sha256((made.path / HEADER).read_bytes()).hexdigest(),
        "kv": f"{model.dtype} {model.kv}",
        **({"neurons": model.neurons} if model.neurons else {}),
        **({"layers off": off} if (off := model.description.layers_off) else {}),
        "chunk": model.chunk,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "code": _code(model.backend.name),
    }


@cache
def _code(backend: str) -> str:
    """A hash of the source that computes, and of the processor that it is compiled for."""
    found = hashlib.sha256(f"{backend} {processor()}".encode())
    for room in COMPUTING:
        for path in sorted((Path(__file__).parents[1] / room).rglob("*.[pch]*")):
            if path.suffix in (".py", ".c", ".h"):
                found.update(path.read_bytes())
    return found.hexdigest()
