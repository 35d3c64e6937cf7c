"""What distilling takes memory for."""

from __future__ import annotations

from outsize.adapt.distill.data import MOST_ANSWERS, MOST_TEXT
from outsize.adapt.distill.task import AT_ONCE
from outsize.adapt.examples import TrainOptions
from outsize.adapt.loop import Recipe
from outsize.adapt.training_peak import Pass, Work, answering
from outsize.model_config import Description


def distilling(d: Description, recipe: Recipe, learning: int, options: TrainOptions) -> Work:
    """Of whole sequences; some are held out, and judged a few at a time, by the teacher's states on all of
    them."""
    length = min(recipe.length, d.context)
    asks = any(".jsonl" in path.suffixes for path in options.data)
    texts = any(".jsonl" not in path.suffixes for path in options.data)
    between = (Pass(AT_ONCE, length, length), *(answering(options, length) if asks else ()))
    held_out = (MOST_ANSWERS * asks + MOST_TEXT * texts) * length
    return Work(recipe.batch, length, length, learning, between=between, states=held_out * d.width)
