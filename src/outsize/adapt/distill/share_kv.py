"""`outsize adapt share-kv`: a model whose last layers read the keys and values of an earlier one, distilled
from what it was; an ordinary pack, whose sharing layers store nothing, and which prompts mostly skip."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from outsize.adapt import rewrite, training_peak
from outsize.adapt.distill import data as texts
from outsize.adapt.distill.made import Made, finish
from outsize.adapt.distill.matrices import MatrixStudent
from outsize.adapt.distill.task import DistillRecipe, DistillTask
from outsize.adapt.distill.work import distilling
from outsize.adapt.examples import TrainOptions, fingerprint
from outsize.adapt.run import opened, session, train
from outsize.adapt.share_keys import queries
from outsize.adapt.trainable import TrainableModel
from outsize.encoding.find import encoding_like
from outsize.errors import UnsupportedError
from outsize.family.sharing import share_keys
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.storage.records import Records

LEARNED = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """How many of the last layers share keys and values."""

    train: TrainOptions
    recipe: DistillRecipe
    layers: int


def share_kv(options: ShareOptions) -> Made:
    """Raises OptionError, UnsupportedError, DataError, PackError and what finding a model raises."""
    pack = fetch.find(options.train.model) or fetch.pack(
        options.train.model, quiet=options.train.quiet
    )
    if not pack.description.is_usual:
        raise UnsupportedError(
            f"{pack.path.name} is a {pack.description.family} model; share-kv is for dense models without "
            "sinks, whose layers all make keys and values"
        )
    d = share_keys(pack.description, options.layers)
    each = 2 * d.width * d.num_heads * d.head_dim + 3 * d.width * d.ffn_width
    learning = options.layers * each
    with (
        session(texts.placed(options.train, pack, "shared")) as (where, device),
        Records(pack) as records,
    ):
        work = distilling(d, options.recipe, learning, where)
        training_peak.check((pack,), replace(work, rebuilt=learning), where)
        model = opened(pack, where, device)
        found = texts.load(where, options.recipe.length, pack, model)
        student = sharing(model, records, d)
        task = DistillTask(options.recipe, model, student, found)
        print_of = fingerprint([found.train, list(found.held_out.values())])
        begun = task.measure(student.change(None))
        training = train(task, where, pack.source.sha256, print_of)
        new = student.made() | {
            key: made for key, made in queries(records, d).items() if key[1] == "qkv_bias"
        }
        learned = rewrite.digest(student.parameters)
        recipe = {"made": "shared keys and values", "layers": options.layers, "learned": learned}
        ends = begun, task.measure(student.change(None))
        name = f"shared{options.layers}"
        return finish((pack, d, name), records, new, recipe, (where, training, found, ends))


def sharing(model: TrainableModel, records: Records, d: Description) -> MatrixStudent:
    """The model whose layers share as `d` says; those layers' matrices learn."""
    begun: dict[tuple[int, str], Tensor] = {}
    encodings: dict[tuple[int, str], str] = {}
    for layer in range(d.num_kv_layers, d.num_layers):
        for name in LEARNED:
            w = records.layer(layer, name)
            begun[layer, name] = w[: d.num_heads * d.head_dim] if name == "qkv" else w
            was = records.weights(layer, name)[0].encoding.name
            encodings[layer, name] = encoding_like(was, w.shape[1])
    sources = {i: layer.shares for i, layer in enumerate(d.layers) if layer.shares is not None}
    return MatrixStudent(model, begun, encodings, "shared", sources)
