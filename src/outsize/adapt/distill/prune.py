"""`outsize adapt prune`: a model with fewer neurons in each feed-forward, distilled from what it was; an
ordinary pack.

Shapes: F neurons, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from outsize.adapt import rewrite, training_peak
from outsize.adapt.change import Change
from outsize.adapt.distill import data as texts
from outsize.adapt.distill.data import Data, collate
from outsize.adapt.distill.made import Made, finish
from outsize.adapt.distill.matrices import MatrixStudent
from outsize.adapt.distill.soft_top_k import MaskStudent
from outsize.adapt.distill.task import DistillRecipe, DistillTask, rows
from outsize.adapt.distill.work import distilling
from outsize.adapt.examples import TrainOptions, fingerprint
from outsize.adapt.run import done, opened, session, train
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import whole
from outsize.encoding.find import encoding_like
from outsize.errors import OptionError, UnsupportedError
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.plan.whatif import narrowed
from outsize.storage.records import Records

WAYS = ("magnitude", "activation", "soft")
SHARE = re.compile(r"[0-9./]{1,20}")  # a fraction, but of no exponents: those may take forever
SEEN = 16  # sequences that activations are measured on


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What stays: the share `ffn` of each feed-forward's neurons (as 2/3 or .67), chosen `by` the size of
    their weights, by what they add on the text, or by scores learned in `mask_steps` steps."""

    train: TrainOptions
    recipe: DistillRecipe
    ffn: str = "2/3"
    by: str = "activation"
    mask_steps: int = 100

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise OptionError(f"by is {self.by!r}; known are {', '.join(WAYS)}")
        whole("mask_steps", self.mask_steps, 1, 1 << 24)
        assert self.share

    @property
    def share(self) -> Fraction:
        """Raises OptionError."""
        try:
            found = Fraction(self.ffn) if SHARE.fullmatch(self.ffn) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            found = Fraction(0)
        if not 0 < found < 1:
            raise OptionError(
                f"ffn is {self.ffn!r}; a share between 0 and 1 is expected, as 2/3 or .67"
            )
        return found


def prune(options: PruneOptions) -> Made:
    """Raises OptionError, UnsupportedError, DataError, PackError and what finding a model raises."""
    pack = fetch.find(options.train.model) or fetch.pack(
        options.train.model, quiet=options.train.quiet
    )
    keep, d = kept(pack, options), pack.description
    learning = 3 * d.num_layers * keep * d.width
    placed = texts.placed(options.train, pack, "pruned")
    is_ours = options.by == "soft" or not options.train.resume
    earlier = (of_scores(placed).checkpoint,) if is_ours else ()
    with (
        session(placed, *earlier) as (where, device),
        Records(pack) as records,
    ):
        work = distilling(d, options.recipe, learning, where)
        scored = d.num_layers * d.ffn_width * d.width  # what masks scale, while they are learned
        training_peak.check((pack,), replace(work, rebuilt=max(learning, scored)), where)
        options = replace(options, train=where)
        model = opened(pack, where, device)
        found = texts.load(where, options.recipe.length, pack, model)
        chosen = choose(options, pack, model, records, found)
        student = pruned(model, pack, records, chosen, options.by)
        task = DistillTask(options.recipe, model, student, found)
        print_of = fingerprint([found.train, list(found.held_out.values())])
        begun = task.measure(student.change(None))
        training = train(task, resumed(where), pack.source.sha256, print_of)
        d = replace(d, ffn_width=keep)
        recipe = {"made": "pruned", "ffn": keep, "learned": rewrite.digest(student.parameters)}
        ends = begun, task.measure(student.change(None))
        trained = where, training, found, ends
        made = finish((pack, d, f"ffn{keep}"), records, student.made(), recipe, trained)
        done(of_scores(where))
        return made


def kept(pack: Pack, options: PruneOptions) -> int:
    """Neurons that stay. Raises OptionError, UnsupportedError."""
    d = pack.description
    if not d.is_usual or d.mlp_bias:
        raise UnsupportedError(
            f"{pack.path.name} is a {d.family} model; prune is for dense models without biases in their "
            "feed-forwards"
        )
    keep = narrowed(d.ffn_width, float(options.share))
    if keep >= d.ffn_width:
        raise OptionError(
            f"ffn is {options.ffn!r}, {keep:,} of {d.ffn_width:,} neurons in multiples of 64, which leaves "
            "nothing out; give a smaller share"
        )
    return keep


def choose(
    options: PruneOptions, pack: Pack, model: TrainableModel, records: Records, found: Data
) -> list[Tensor]:
    """The neurons of each layer that stay, in their order."""
    keep = kept(pack, options)
    if options.by == "magnitude":
        scores = [magnitude(records, layer) for layer in range(pack.description.num_layers)]
    else:
        scores = activation(model, found)
    if options.by == "soft":
        student = MaskStudent(model, scores, keep, options.mask_steps)
        recipe = replace(options.recipe, steps=options.mask_steps, loss="kl", rate=0.05)
        task, where = DistillTask(recipe, model, student, found), of_scores(options.train)
        train(task, resumed(where), pack.source.sha256, fingerprint([found.train]))
        scores = student.scores()
    return [score.topk(keep).indices.sort().values for score in scores]


def of_scores(where: TrainOptions) -> TrainOptions:
    """With a checkpoint of their own, which stays until all is done: resumed, they are not learned again."""
    name = f"{where.output.stem}-scores.safetensors"
    return replace(where, output=where.output.with_name(name))


def resumed(where: TrainOptions) -> TrainOptions:
    """Gone on from as far as it came: of two parts the second may not have begun."""
    return replace(where, resume=where.resume and where.checkpoint.is_file())


def magnitude(records: Records, layer: int) -> Tensor:
    """(F,) product of the norms of each neuron's rows and column."""
    gate_up, down = (records.layer(layer, name) for name in ("gate_up", "down"))
    gate, up = gate_up.chunk(2)
    norms: Tensor = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return norms


class _Inner(Change):
    """Sums of what enters each layer's down map, in size; and the sizes of that map's columns."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "down":
            total = x.float().abs().flatten(0, -2).sum(dim=0)
            self.sums[layer] = self.sums.get(layer, torch.zeros_like(total)) + total
            if layer not in self.columns:
                self.columns[layer] = w.float().norm(dim=0)
        return w


@torch.no_grad()
def activation(model: TrainableModel, found: Data) -> list[Tensor]:
    """(F,) for each layer: the mean size of a neuron on the text, times its column's."""
    seen, every = _Inner(), max(1, len(found.train) // SEEN)
    for example in found.train[::every][:SEEN]:
        batch = collate([example], model.device)
        model.run(rows(model, batch.tokens_BS), change=seen)
    return [(seen.sums[i] * seen.columns[i]).cpu() for i in sorted(seen.sums)]


def pruned(
    model: TrainableModel, pack: Pack, records: Records, chosen: Sequence[Tensor], by: str
) -> MatrixStudent:
    """The model whose feed-forwards have these neurons alone, chosen `by` what; they learn as a whole."""
    begun: dict[tuple[int, str], Tensor] = {}
    encodings: dict[tuple[int, str], str] = {}
    for layer, kept_F in enumerate(chosen):
        before: Mapping[str, str] = {
            name: records.weights(layer, name)[0].encoding.name for name in ("gate_up", "down")
        }
        gate, up = records.layer(layer, "gate_up").chunk(2)
        begun[layer, "gate_up"] = torch.cat([gate[kept_F], up[kept_F]])
        begun[layer, "down"] = records.layer(layer, "down")[:, kept_F].contiguous()
        for name, was in before.items():
            encodings[layer, name] = encoding_like(was, begun[layer, name].shape[1])
    return MatrixStudent(model, begun, encodings, f"pruned by {by}", {})
