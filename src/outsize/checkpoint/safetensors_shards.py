"""Which .safetensors files of a folder are its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from outsize.checkpoint.file_names import is_shadow, parts_of
from outsize.errors import CheckpointError, SourceError, UnsupportedError

INDEX = "model.safetensors.index.json"
MAIN = "model.safetensors"
# Doubles of the weights, or none of them: Mistral's own layout, other precisions, adapters.
DOUBLE = re.compile(
    r"consolidated.*|adapter_model.*|.*[._-](?:fp16|fp32|bf16|non_ema)(?:[._-].*)?\.safetensors"
)


def weights(
    names: Collection[str], read: Callable[[str], Mapping[str, object]], file: str, where: str
) -> list[str]:
    """Those that the index names; else model.safetensors; else the only file, or the only complete set of
    shards. If `file` is none of these, that file alone. Raises CheckpointError, SourceError,
    UnsupportedError."""
    top = sorted(n for n in names if n.endswith(".safetensors") and not ("/" in n or is_shadow(n)))
    if file.startswith("consolidated"):
        raise UnsupportedError(
            f"{where}: {file} is in Mistral's own layout, which outsize does not read; use "
            "model.safetensors of the same repository, or a GGUF"
        )
    if INDEX in names:
        own = _indexed(names, read, where)
        return own if not file or file in own else _alone(top, file, where)
    if file:
        return _alone(top, file, where)
    return [MAIN] if MAIN in top else _unlisted(top, where)


def _indexed(
    names: Collection[str], read: Callable[[str], Mapping[str, object]], where: str
) -> list[str]:
    mapping = read(INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{where}: {INDEX} has no 'weight_map'; fetch it again")
    own = sorted({str(v) for v in mapping.values()})
    for name in own:
        if "/" in name or name not in names:
            raise CheckpointError(
                f"{where}: shard {name!r}, which {INDEX} names, is not in the folder; fetch it"
            )
    return own


def _alone(top: list[str], file: str, where: str) -> list[str]:
    parts = parts_of(file)
    missing = [p for p in parts if p not in top]
    if missing:
        raise CheckpointError(f"{where}: shard {missing[0]!r} is not in the folder; fetch it")
    return parts


def _unlisted(top: list[str], where: str) -> list[str]:
    """The weights of a folder without an index and model.safetensors."""
    found = [n for n in top if not DOUBLE.fullmatch(n)]
    found = found or [n for n in top if not n.startswith(("consolidated", "adapter_model"))]
    sets = {tuple(parts_of(n)) for n in found}
    if not sets:
        raise CheckpointError(f"{where}: no .safetensors file in this folder")
    if len(sets) > 1:
        raise SourceError(
            f"{where}: {len(found)} .safetensors files and no {INDEX}, so that it is not known which are "
            f"the model's; give one by its name: {', '.join(found[:8])}"
        )
    return _alone(top, found[0], where)
