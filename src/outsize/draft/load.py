"""`--draft`: what guesses ahead, made from a specification once a model is open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from outsize.checkpoint import lora as adapters
from outsize.checkpoint.bases import are_other
from outsize.checkpoint.lora import AdapterFile, Factors
from outsize.draft import mtp_head
from outsize.draft.auto import MOST, AutoDraft, DraftStats
from outsize.draft.drafter import Drafter
from outsize.draft.model import ModelDraft
from outsize.draft.mtp import MtpDraft, MtpModel
from outsize.draft.ngram import NgramDraft
from outsize.draft.none import NoDraft
from outsize.draft.spec import DraftSpec
from outsize.draft.step_time import StepTimes
from outsize.draft.verify import Check, rejecting, verify
from outsize.encoding.find import encoding
from outsize.errors import AdapterError, UnsupportedError
from outsize.home import expanded, home
from outsize.kernels.backend import Backend
from outsize.kernels.layouts import BLOCK
from outsize.kernels.plain import PLAIN
from outsize.log import warn
from outsize.model.lora import Adapter, check_shapes
from outsize.model.transformer import Transformer
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.sampling.sample import Sampler

SPARE = 64  # slots of keys and values for what is drafted and not kept
ROW_BYTES = 6  # of a logit: as the head's product has it, and in fp32
ADAPTER = 0.52  # of a mask drafter's file: its factors and its sampler head in eight bits, its masks as fp32
WORTH_MASKS, WORTH_TEXT = 1.4, 1.3  # times as much may be read a step, for what guesses bring
SHIPPED = Path(__file__).with_name("shipped")


def choices(outline: Outline) -> list[tuple[DraftSpec, float]]:
    """What `auto` may turn out to be, the best first, and how many times as much may be read a step for
    it. Plans choose by memory."""
    masks = DraftSpec("masks")
    text = [(DraftSpec("ngram"), WORTH_TEXT)]
    return text if mask_file(masks, outline) is None else [(masks, WORTH_MASKS), *text]


def shipped(sha256: str) -> Path | None:
    """The mask drafter that came with outsize, or was put into its home, for this very model."""
    name = f"masks-{sha256[:12]}.safetensors"
    places = (home() / "adapters" / name, SHIPPED / name)
    return next((p for p in places if p.is_file()), None)


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A smaller model, opened and fully resident. It drafts token ids, so it needs no tokenizer."""

    transformer: Transformer
    context: int
    close: Callable[[], None]


@dataclass(slots=True)
class Drafting:
    """Makes each sequence's drafter."""

    spec: DraftSpec
    draft_stats: DraftStats = field(default_factory=DraftStats)
    model: DraftModel | None = None

    @property
    def masks(self) -> MtpModel | None:
        """The mask drafter, if there is one."""
        return self.draft_stats.masks

    @property
    def pace(self) -> StepTimes | None:
        """What is to be told how long steps take, if anything asks."""
        return self.draft_stats.pace if self.spec.kind == "auto" else None

    def new(self, sampler: Sampler, others: int = 0) -> tuple[Drafter, Check]:
        """A drafter, and what checks its guesses; `others`: sequences that share its steps."""
        kind, k = self.spec.kind, self.spec.k
        if kind == "model":
            return self._smaller(sampler)
        if kind == "auto":
            return AutoDraft(self.draft_stats, others), verify
        if kind == "ngram":
            return NgramDraft(k or 4), verify
        if kind == "masks":
            assert self.masks is not None
            return MtpDraft(self.masks, k or self.masks.k, self.spec.layout), verify
        return NoDraft(), verify

    def _smaller(self, sampler: Sampler) -> tuple[Drafter, Check]:
        assert self.model is not None
        t, context, k = self.model.transformer, self.model.context, self.spec.k or 4
        if self.spec.verify == "pick":
            return ModelDraft(t, t.new_kv(context), context, k), verify
        drafter = ModelDraft(t, t.new_kv(context), context, k, sampler)
        return drafter, rejecting(sampler, lambda: drafter.drawn_from)

    def restore(self) -> None:
        """After a step that an exception broke off."""
        if self.model is not None:
            self.model.transformer.restore()

    def close(self) -> None:
        """A mask drafter reaches into the network it drafts for: a closed model keeps none of it."""
        if self.model is not None:
            self.model.close()
        self.model, self.draft_stats = None, DraftStats()


def mask_file(spec: DraftSpec, outline: Outline) -> Path | None:
    """The adapter that a specification means, if any."""
    if spec.kind != "masks":
        return None
    if spec.source:
        return expanded(spec.source)
    dense = outline.description.mixture is None
    return shipped(outline.sha256) if dense and outline.sha256 else None


def with_drafting(spec: DraftSpec, outline: Outline) -> Outline:
    """A model with what drafting takes of memory: always the adapter and slots for what is not kept; in a
    step, in place of a prompt's scratch, the logits of its rows."""
    if spec.kind == "none":
        return outline
    d, file = outline.description, mask_file(spec, outline)
    slots = SPARE * 4 * d.num_layers * d.num_kv_heads * d.head_dim
    adapter = 0 if file is None else int(ADAPTER * adapters.file_bytes(file))
    logits = (MOST + 1) * d.vocab_size * ROW_BYTES
    return replace(outline, drafting=slots + adapter, step_scratch=logits)


def read_adapter(pack: Pack, name: str, path: Path) -> Adapter:
    """A LoRA adapter for a dense model, for which `plan.beside` has found room. Raises AdapterError."""
    file = adapters.load(path)
    if file.about.get("kind") == "masks":
        raise AdapterError(
            f"{path} is a mask drafter, which guesses and does not change answers; use it with "
            f"--draft masks:{path}"
        )
    base, ours = file.about.get("base_name"), (pack.source.spec, pack.source.files[0][0])
    if isinstance(base, str) and are_other(base, ours):
        warn(
            f"{path} says that it was trained on {base}, and this model is {pack.source.spec}: its "
            "shapes fit, but over another base an adapter may do anything; use its own"
        )
    return _additions(name, file, pack.description, pack.source.sha256, pack.path.name)


def check(spec: DraftSpec, outline: Outline) -> None:
    """Raises what opening a named drafter would, from files alone."""
    if spec.kind == "model":
        fetch.outline(spec.source, quiet=True)
    if spec.kind == "masks" and spec.source:
        _checked_masks(
            expanded(spec.source), spec.k, outline.description, outline.sha256, outline.name
        )


def _checked_masks(
    path: Path, k: int, d: Description, base: str, name: str
) -> tuple[AdapterFile, Adapter, Tensor]:
    """A mask drafter's file, its additions and its masks. Raises AdapterError."""
    file = adapters.load(path)
    if d.mixture is not None:
        raise UnsupportedError(f"{path}: mask drafters are for dense models; use --draft ngram")
    if file.about.get("kind") != "masks":
        raise AdapterError(
            f"{path} is no mask drafter: a LoRA adapter is loaded with --adapter NAME={path}, and "
            "`outsize adapt masks` trains a drafter"
        )
    adapter, masks = _additions(str(path), file, d, base, name, True), file.tensors.get("masks")
    if masks is None or masks.dim() != 2 or masks.shape[1] != d.width:
        raise AdapterError(f"{path} has no masks {d.width:,} numbers wide; it is for another model")
    if k > len(masks):
        raise AdapterError(f"k is {k}, but {path} has {len(masks)} masks; ask for at most that")
    adapters.finite(
        file, [n for n in file.tensors if n == "masks" or n.startswith(mtp_head.PREFIX)]
    )
    return file, adapter, masks


def mask_model(path: Path, k: int, pack: Pack, transformer: Transformer) -> MtpModel:
    """Read and check a mask drafter. Raises AdapterError."""
    t, d = transformer, pack.description
    file, adapter, masks = _checked_masks(path, k, d, pack.source.sha256, pack.path.name)
    head = mtp_head.stages(_head(file, d), partial(_product, t.backend))
    return MtpModel(masks, adapter, head, t.likely, t.embed, t.head_rows)


def _product(backend: Backend, weight: Tensor) -> mtp_head.Product:
    """With a matrix of the sampler head, in eight bits where there are kernels for that, else in bf16."""
    if backend is PLAIN or weight.shape[1] % BLOCK:
        return mtp_head.plainly(weight.bfloat16())
    coded = encoding("group8", backend)
    fields = coded.encode(weight)
    return lambda x: coded.linear(x, fields, False)


def _additions(
    name: str, file: AdapterFile, d: Description, base: str, model: str, coarse: bool = False
) -> Adapter:
    """A file's low-rank factors, if they are this model's and numbers; `base`: its hash, or "" where it is
    not known yet. Raises AdapterError."""
    if base:
        adapters.same_base(file, base, model)
    factors = Factors(file, d.head_dim)
    check_shapes(name, d, factors.shapes)
    adapters.finite(file, [f"{name}.{factor}" for name in factors for factor in "AB"])
    return Adapter(name, d, factors, file.scale, coarse)


def same_vocabulary(pack: Pack, smaller: Pack) -> None:
    """Raises AdapterError unless both models read the same tokens."""
    if smaller.tokenizer_crc != pack.tokenizer_crc:
        raise AdapterError(
            f"{smaller.path.name} does not read text as {pack.path.name} does; a draft model needs the "
            "same tokenizer"
        )


def _head(file: AdapterFile, d: Description) -> dict[str, Tensor]:
    found = mtp_head.of(file.tensors)
    want = mtp_head.shapes(d.width)
    if found and {k: tuple(t.shape) for k, t in found.items()} != want:
        raise AdapterError(f"{file.path}: its sampler head does not fit a width of {d.width:,}")
    return found
