"""Finds, reads and checks the file of a multi-token prediction drafter (arXiv 2507.11851): mask tokens,
low-rank factors and a sampler head in one safetensors file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from outsize.checkpoint import lora as files
from outsize.checkpoint.lora import AdapterFile
from outsize.draft import mtp_head
from outsize.draft.mtp import MtpModel
from outsize.draft.spec import DraftSpec
from outsize.encoding.find import encoding
from outsize.errors import AdapterError, UnsupportedError
from outsize.home import expanded, home
from outsize.kernels.backend import Backend
from outsize.kernels.layouts import BLOCK
from outsize.kernels.plain import PLAIN
from outsize.model.lora import Adapter, check_shapes
from outsize.model.lora_file import MTP, additions
from outsize.model.transformer import Transformer
from outsize.pack.outline import Outline

SHIPPED = Path(__file__).with_name("shipped")


def find(spec: DraftSpec, model: Outline) -> Path | None:
    """The file that a specification means: the one it names, else the one that came with outsize, or was put
    into its home, for this very model, else for the one that its numbers were made from."""
    if spec.kind != "mtp":
        return None
    if spec.source:
        return expanded(spec.source)
    if not model.description.is_usual or not model.sha256:
        return None
    for sha in (model.sha256, *model.kin):
        for folder in (home() / "adapters", SHIPPED):
            path = folder / f"masks-{sha[:12]}.safetensors"
            if path.is_file() and (sha == model.sha256 or _fits(path, model)):
                return path
    return None


def _fits(path: Path, model: Outline) -> bool:
    """Are the maps of a model that was made from another one as wide as that one's, for which the file is?"""
    try:
        check_shapes(path.name, model.description, files.load(path).factors())
    except AdapterError:
        return False
    return True


def check(path: Path, k: int, model: Outline) -> tuple[AdapterFile, Adapter, Tensor]:
    """A drafter's file, its additions and its mask tokens (K, D), of which at least `k` are there. Raises
    AdapterError, UnsupportedError."""
    d, file = model.description, files.load(path)
    if d.mixture is not None:
        raise UnsupportedError(
            f"{path}: mask-token drafters (mtp) are for dense models; use --draft ngram"
        )
    if not d.is_usual:
        raise UnsupportedError(f"{path}: mask-token drafters of {d.family} models are not known")
    if file.about.get("kind") != MTP:
        raise AdapterError(
            f"{path} is no mask-token drafter: a LoRA adapter is loaded with --adapter NAME={path}, and "
            "`outsize adapt mtp` trains a drafter"
        )
    adapter, masks = additions(str(path), file, model, coarse=True), file.tensors.get("masks")
    if masks is None or masks.dim() != 2 or masks.shape[1] != d.width:
        raise AdapterError(
            f"{path} has no mask tokens {d.width:,} numbers wide; it is for another model"
        )
    if k > len(masks):
        raise AdapterError(f"k is {k}, but {path} has {len(masks)} masks; ask for at most that")
    files.finite(file, [n for n in file.tensors if n == "masks" or n.startswith(mtp_head.PREFIX)])
    return file, adapter, masks


def read(path: Path, k: int, model: Outline, transformer: Transformer) -> MtpModel:
    """A drafter that uses the network it drafts for. Raises AdapterError, UnsupportedError."""
    t, (file, adapter, masks) = transformer, check(path, k, model)
    weights, want = mtp_head.of(file.tensors), mtp_head.shapes(model.description.width)
    if weights and {name: tuple(w.shape) for name, w in weights.items()} != want:
        width = model.description.width
        raise AdapterError(f"{path}: its sampler head does not fit a width of {width:,}")
    head = mtp_head.stages(weights, partial(_product, t.backend))
    return MtpModel(masks, adapter, head, t)


def _product(backend: Backend, weight: Tensor) -> mtp_head.Product:
    """With a matrix of the sampler head, in eight bits where there are kernels for that, else in bf16."""
    if backend is PLAIN or weight.shape[1] % BLOCK:
        return mtp_head.plainly(weight.bfloat16())
    coded = encoding("group8", backend)
    fields = coded.encode(weight)
    return lambda x: coded.linear(x, fields, False)
