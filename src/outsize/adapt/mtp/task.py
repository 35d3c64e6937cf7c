"""The training task of multi-token prediction: mask tokens that predict what the model will say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from outsize.adapt import training_peak
from outsize.adapt.examples import Example, TrainOptions
from outsize.adapt.mtp.losses import MtpRecipe, losses, new_parameters, sample_batch, total
from outsize.adapt.mtp.simulate import ANCHORS, AT_ONCE, simulate
from outsize.adapt.trainable import TrainableModel
from outsize.adapt.training_peak import Pass, answering
from outsize.draft import mtp_head
from outsize.model.lora_file import MTP
from outsize.model_config import Description


def work(recipe: MtpRecipe, options: TrainOptions, d: Description) -> training_peak.Work:
    """Mask tokens learn, over the keys of ordinary ones; what is not gated, by these. Before, the model may
    answer; between, some answers are judged."""
    length, masks = min(recipe.length, d.context), recipe.anchors * recipe.k
    keys, judged = length + masks, ANCHORS * recipe.k
    between = (
        Pass(AT_ONCE, max(length, judged), length + judged, True),
        *answering(options, length),
    )
    sampler = sum(map(math.prod, mtp_head.shapes(d.width).values())) * recipe.sampler
    learning = training_peak.learning_of(d, recipe.rank) + recipe.k * d.width + sampler
    rows = masks if recipe.gated else keys
    return training_peak.Work(recipe.batch, rows, keys, learning, between=between)


class MtpTask:
    """A `Task` of the training loop."""

    use = "--draft mtp:"

    def __init__(
        self,
        recipe: MtpRecipe,
        model: TrainableModel,
        examples: Sequence[Example],
        held_out: Sequence[Example] = (),
    ) -> None:
        self.recipe, self.model = recipe, model
        self._examples, self._held_out = examples, held_out
        made = new_parameters(model.description, recipe, model.embed_VD)
        self.parameters = {k: v.to(model.device).requires_grad_() for k, v in made.items()}

    def loss(self, step: int, part: slice) -> Tensor:
        batch = sample_batch(self._examples, self.recipe, step, part).to(self.model.device)
        return total(losses(self.model, self.parameters, self.recipe, batch), self.recipe)

    def evaluate(self) -> dict[str, float]:
        """Tokens a step on answers that are not trained on; 0: there are none."""
        rate, r = 0.0, self.recipe
        if self._held_out:
            found = simulate(self.model, self.parameters, r.scale, self._held_out, r.k)
            rate = round(found.by_quadratic, 4)
        return {"held_out_tokens_per_step": rate}

    def about(self) -> dict[str, object]:
        r = self.recipe
        return {"kind": MTP, "rows": "adjacent", "k": r.k, "scale": r.scale}
