"""Tensors that a model's plan does not use: on a short list of known spares, or a reason to refuse it."""

from __future__ import annotations

import re
from collections.abc import Collection

from outsize.errors import CheckpointError, OutsizeError, UnsupportedError
from outsize.family.recipe import Recipe

# Tables of rotary positions: made from the config anew, or read with it (rope_freqs).
SPARES = (
    r"rope_freqs\.weight",
    r"blk\.\d+\.attn_rot_embd\.weight",
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)",
)
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(scale|scale_inv|packed|format|shape|zero_point)|absmax"
    r"|quant_map|nested_absmax|nested_quant_map|quant_state.*|input_scale)$|\.absmax|\.quant_state"
)


def refuse_unused(names: Collection[str], used: Collection[str], recipe: Recipe) -> None:
    """Raises UnsupportedError if a tensor is neither used nor a known spare."""
    unused = [n for n in names if n not in used and not _is_spare(n, recipe)]
    if not unused:
        return
    name, family = min(unused), recipe.description.family
    more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
    if QUANTIZED.search(name):
        raise UnsupportedError(
            f"tensor {name!r}{more} belongs to a quantized checkpoint of a kind that is not known; use the "
            "original weights, or a GGUF"
        )
    why = (
        "its config does not ask for it" if _is_named(name, recipe) else "outsize does not know it"
    )
    raise UnsupportedError(
        f"tensor {name!r}{more} is not used by this {family} model: {why}, so that the answers would not "
        "be the model's"
    )


def missing(name: str, names: Collection[str], recipe: Recipe) -> OutsizeError:
    """What to say of a tensor that is not there: tensors that nobody knows are a sign of another layout."""
    strange = [n for n in names if not _is_named(n, recipe) and not _is_spare(n, recipe)]
    if strange:
        return UnsupportedError(
            f"tensor {name!r} is not there, but {min(strange)!r} is, which is not known in a "
            f"{recipe.description.family} model: a layout that outsize does not run"
        )
    if name == recipe.names["head"]:
        return CheckpointError(
            f"tensor {name!r} is missing, and tie_word_embeddings does not say that the embedding stands "
            "for it; the checkpoint is not complete"
        )
    return CheckpointError(f"tensor {name!r} is missing; the checkpoint is not complete")


def _is_spare(name: str, recipe: Recipe) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in (*SPARES, *recipe.spares))


def _is_named(name: str, recipe: Recipe) -> bool:
    """Could it be one of the family's, in some layer and of some expert?"""
    patterns = (re.escape(n) for n in recipe.names.values())
    made = (p.replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+") for p in patterns)
    return any(re.fullmatch(pattern, name) for pattern in made)
