"""What drafting takes of memory, and which drafters `--draft auto` may choose from."""

from __future__ import annotations

from dataclasses import replace

from outsize.checkpoint.lora import file_bytes
from outsize.draft import mtp_file
from outsize.draft.drafter import MOST, SPARE
from outsize.draft.spec import DraftSpec
from outsize.pack.outline import Outline

ROW_BYTES = 6  # of a logit: as the head's product has it, and in fp32
MTP_SHARE = 0.52  # of a drafter's file: factors and sampler head in eight bits, mask tokens in fp32
WORTH_MTP, WORTH_TEXT = 1.4, 1.3  # times as much may be read a step, for what draft tokens bring


def choices(outline: Outline) -> list[tuple[DraftSpec, float]]:
    """What `auto` may turn out to be, the best first, and how many times as much may be read a step for
    it. Plans choose by memory."""
    mtp, text = DraftSpec("mtp"), [(DraftSpec("ngram"), WORTH_TEXT)]
    # The adapters of mask tokens change which neurons fire.
    is_there = outline.neurons is None and mtp_file.find(mtp, outline) is not None
    return [(mtp, WORTH_MTP), *text] if is_there else text


def with_drafting(spec: DraftSpec, outline: Outline) -> Outline:
    """A model with what drafting takes: always the drafter's file and slots for what is not kept; in a step,
    in place of a prompt's scratch, the logits of its rows."""
    if spec.kind == "none":
        return outline
    d, file = outline.description, mtp_file.find(spec, outline)
    each = d.kv_sizes
    entries = (each[i] for i in d.kv_layers)
    slots = SPARE * 4 * sum(heads * numbers for heads, numbers in entries)
    weights = 0 if file is None else int(MTP_SHARE * file_bytes(file))
    logits = (MOST + 1) * d.vocab_size * ROW_BYTES
    return replace(outline, drafting=slots + weights, step_scratch=logits)
