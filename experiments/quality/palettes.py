"""What fewer bits cost: `python -m experiments.quality.palettes MODEL TEXT GSM8K.jsonl.gz [--arms ...]`.

Every matrix of the layers (--every 3: of every third one) in each arm, with statistics of 8 tokens an input
of TEXT; then the divergence from the pack's own numbers on 1,024 other tokens of TEXT and 512 of GSM8K, in
nats. All bits are counted.

    palette:B        tables for 16 rows, steps for 64 inputs, error feedback: what `outsize pack --bits` makes
    even:B           the same with evenly spaced levels: "uniform"
    plain:B          palettes without feedback (k-means weighted by activations); even-plain:B
    row:B            one step a row, as the paper's large groups; row-plain:B
    ggml:TYPE        llama.cpp's own quantizer, with importance (--ggml: its library, libggml-base.so)
    best:BITS[:B,B]  the knapsack over palettes of these sizes (3,4,5), which must be among the arms
    random:BITS[:B,B]  a random mix of as many bits
    qkv:B,B          queries, keys and values in the second size; qkvo:B,B  o as well
"""

from __future__ import annotations

import ctypes
import gzip
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from experiments.runs import Row, arguments, record
from outsize.adapt.bits import Option, Stack, choose
from outsize.adapt.calibration import due, start_of
from outsize.adapt.divergence import divergence, following
from outsize.adapt.fewer_bits import Over
from outsize.adapt.palettes import Factor, encoding_of, feedback
from outsize.adapt.statistics import LENGTH, Inputs, States, sequences
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.encoding.levels import MOST, Fitted, between, fit
from outsize.encoding.palette import Palette
from outsize.engine import open_tokens
from outsize.kernels.palettes import FORMS, Form
from outsize.pack import fetch
from outsize.progress import silent
from outsize.storage.records import Records

EVAL, OTHER = 1024, 512
ARMS = "palette:2 palette:3 palette:4 palette:5 best:3.44 best:3.5 best:4.25 qkv:3,4 qkvo:3,4 " + (
    "random:3.44 random:3.44 random:3.44 best:3.2:2,4"
)
Weights = tuple[torch.Tensor, float, float]  # numbers; bytes; relative error of outputs


def form_of(kind: str, bits: int, width: int) -> tuple[str, Form]:
    if kind.startswith("row"):
        return "row", Form(bits, width, ())
    name = encoding_of(bits, width)
    return name, FORMS[name]


def evenly(form: Form, w_NK: torch.Tensor, h_K: torch.Tensor) -> Fitted:
    """Evenly spaced levels, on both sides of nothing; of ten steps the one that loses least."""
    levels = torch.linspace(-MOST, MOST, 1 << form.bits).round().to(torch.int8)
    groups = w_NK.view(len(w_NK), -1, form.group)
    h, top = h_K.view(1, -1, form.group), groups.abs().amax(dim=2)
    best, least = top / MOST, torch.full_like(top, torch.inf)
    for share in torch.linspace(0.55, 1.0, 10).tolist():
        step = (top * share / MOST).clamp_min(1e-30)
        x = (groups / step[..., None]).contiguous()
        near = levels.float()[torch.bucketize(x, between(levels[None])[0])] * step[..., None]
        lost = ((near - groups).square() * h).sum(dim=2)
        best, least = torch.where(lost < least, step, best), torch.minimum(lost, least)
    return Fitted(best, levels.expand(len(w_NK) // 16, -1).contiguous())


def ours(kind: str, bits: int, w: torch.Tensor, factor: Factor) -> Weights:
    name, form = form_of(kind, bits, w.shape[1])
    palette, h = Palette(name, form), factor.moment.diagonal()
    fitted = (evenly if kind.startswith("even") else fit)(form, w, h)
    scales, step = palette.rounded(fitted.step_NG)
    fitted = fitted._replace(step_NG=step)
    if kind in ("plain", "even-plain", "row-plain"):
        x = (w / step.clamp_min(1e-30).repeat_interleave(form.group, dim=1)).clamp(-MOST, MOST)
        codes = torch.searchsorted(between(fitted.levels_JL), x.view(len(w) // 16, -1))
        codes = codes.view_as(w).to(torch.uint8)
    else:
        codes = feedback(w, fitted, factor, form.group)
    made = palette.from_codes(codes, scales) | {"levels": fitted.levels_JL}
    return palette.decode(made), float(sum(f.nbytes for f in made.values())), 0.0


def theirs(library: ctypes.CDLL, kind: str, w: torch.Tensor, factor: Factor) -> Weights:
    """By ggml_quantize_chunk. Rows are padded to whole blocks, and billed unpadded."""
    found = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[found]
    rows, width = w.shape
    more = -width % block
    whole = np.ascontiguousarray(np.pad(w.numpy(), ((0, 0), (0, more))))
    h = np.pad(factor.moment.diagonal().numpy(), (0, more), constant_values=1e-9)
    h, out = (
        np.ascontiguousarray(h, np.float32),
        np.zeros((rows, (width + more) // block * size), np.uint8),
    )
    pointers = (whole.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
    library.ggml_quantize_chunk(
        int(found), *pointers, *map(ctypes.c_int64, (0, rows, width + more)),
        h.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    back = gguf.dequantize(out, found)[:, :width]
    return torch.from_numpy(np.ascontiguousarray(back)), rows * width * size / block, 0.0


class Arms:
    """Every matrix in every arm that is made by itself."""

    def __init__(
        self, names: list[str], ggml: str, records: Records, model: TrainableModel
    ) -> None:
        self.names = [n for n in names if n.split(":")[0] not in ("best", "random", "qkv", "qkvo")]
        self.records, self.model = records, model
        self.made: dict[tuple[str, int, str], Weights] = {}
        self.alone: dict[tuple[str, int, str], float] = {}  # KL with this alone
        self.library = ctypes.CDLL(ggml) if ggml else None

    def layer(
        self, layer: int, moments: dict[str, torch.Tensor], cost: Callable[..., float]
    ) -> None:
        for name, moment in moments.items():
            w, factor = self.records.layer(layer, name), Factor(moment)
            for arm in self.names:
                kind, _, what = arm.partition(":")
                if kind == "ggml":
                    assert self.library is not None
                    found = theirs(self.library, what, w, factor)
                else:
                    found = ours(kind, int(what), w, factor)
                lost = found[0] - w
                error = float(((lost @ moment) * lost).sum() / ((w @ moment) * w).sum())
                self.made[arm, layer, name] = found[0].to(self.model.dtype), found[1], error
                if arm in ("palette:2", "palette:3") and cost is not None:
                    self.alone[arm, layer, name] = cost(layer, name, self.made[arm, layer, name][0])

    def options(self, sizes: list[int]) -> dict[Stack, list[Option]]:
        out: dict[Stack, list[Option]] = {}
        for layer, name in {(i, n) for _, i, n in self.made}:
            rate = 0.0
            for b in sizes:
                _, size, error = self.made[f"palette:{b}", layer, name]
                known = self.alone.get((f"palette:{b}", layer, name))
                rate = rate if known is None else known / error
                out.setdefault((layer, name), []).append(Option(b, int(size), rate * error))
        return out

    def chosen(self, arm: str, number: int) -> dict[Stack, str]:
        """By stack the arm that it is in."""
        kind, what, *more = arm.split(":")
        stacks = sorted({(i, n) for _, i, n in self.made})
        if kind in ("qkv", "qkvo"):
            low, high = what.split(",")
            raised = ("qkv",) if kind == "qkv" else ("qkv", "o")
            return {s: f"palette:{high if s[1] in raised else low}" for s in stacks}
        if kind not in ("best", "random"):
            return dict.fromkeys(stacks, arm)
        sizes = [int(b) for b in (more[0] if more else "3,4,5").split(",")]
        weights = sum(self.made[f"palette:{sizes[0]}", *s][0].numel() for s in stacks)
        budget, options = int(float(what) * weights / 8), self.options(sizes)
        if kind == "best":
            layers = sorted({i for i, _ in stacks})
            packed = {(layers.index(i), n): found for (i, n), found in options.items()}
            return {(layers[i], n): f"palette:{b}" for (i, n), b in choose(packed, budget).items()}
        picked, order = dict.fromkeys(stacks, sizes[0]), list(stacks)
        random.Random(number).shuffle(order)
        size = {s: {o.bits: o.size for o in options[s]} for s in stacks}
        left = budget - sum(size[s][sizes[0]] for s in stacks)
        for s in order:
            if (more_bytes := size[s][sizes[1]] - size[s][sizes[0]]) <= left:
                picked[s], left = sizes[1], left - more_bytes
        return {s: f"palette:{b}" for s, b in picked.items()}


def tokens_of(model: str, text: Path, gsm: Path) -> tuple[list[int], list[int]]:
    tokens = open_tokens.tokens(fetch.pack(model, quiet=True))
    words = text.read_text(encoding="utf-8").replace("<unk>", "unk")
    with gzip.open(gsm, "rt") as f:
        lines = [json.loads(line) for line in itertools.islice(f, 40)]
    said = "\n\n".join(f"Question: {x['question']}\nAnswer: {x['answer']}" for x in lines)
    return tokens.encode(words, start=False), tokens.encode(said, start=False)[:OTHER]


def measured(model: TrainableModel, ids: torch.Tensor) -> Callable[[Over], Row]:
    states = States(model, ids)
    follow = following(ids).flatten()
    former = states.ends()

    def measure(over: Over) -> Row:
        d = divergence(model, former, states.ends(over), follow)
        return {k: round(v, 4) for k, v in d._asdict().items()}

    return measure


@torch.inference_mode()
def main() -> None:
    a = arguments(__doc__, "model", "text", "gsm", arms=ARMS.split(), ggml="", probe=1, every=1)
    pack, began = fetch.pack(a.model, quiet=True), time.time()
    words, other = tokens_of(a.model, Path(a.text), Path(a.gsm))
    device, start = torch.device("cpu"), start_of(pack)
    model = TrainableModel(pack, device, matmul_type(device), silent)
    fit_to = words[8 * EVAL : 8 * EVAL + due(pack.description)]
    inputs = Inputs(model, fit_to, start)
    probe = States(model, sequences(words[:LENGTH], start, LENGTH))
    first = probe.ends()
    ids = sequences(words[:LENGTH], start, LENGTH)
    follow = following(ids).flatten()

    def cost(layer: int, name: str, w: torch.Tensor) -> float:
        ends = probe.ends(Over({(layer, name): w}))
        return divergence(model, first, ends, follow).kl

    with Records(pack) as records:
        arms = Arms(a.arms, a.ggml, records, model)
        for layer in range(pack.description.num_layers):
            moments = inputs.next()
            if layer % a.every == 0:
                arms.layer(layer, moments, cost if a.probe else None)  # type: ignore[arg-type]
            probe.advance()
            print(
                f"layer {layer} of {pack.description.num_layers}: {time.time() - began:.0f} s",
                flush=True,
            )
    texts = {
        "wikitext": sequences(words[:EVAL], start, LENGTH),
        "gsm8k": sequences(other, start, LENGTH),
    }
    measures = {name: measured(model, ids) for name, ids in texts.items()}
    for number, arm in enumerate(a.arms):
        parts = arms.chosen(arm, number)
        found = {s: arms.made[of, *s] for s, of in parts.items()}
        over = Over({s: made[0] for s, made in found.items()})
        weights = sum(made[0].numel() for made in found.values())
        row: Row = {"model": pack.path.name, "arm": arm, "fitted_to": len(fit_to)}
        row["bits"] = round(8 * sum(made[1] for made in found.values()) / weights, 4)
        row |= {name: measure(over) for name, measure in measures.items()}
        if a.every > 1:
            row["every"] = a.every
        if len(set(parts.values())) > 1:
            row["sizes"] = {
                n: "".join(parts[s][-1] for s in sorted(parts) if s[1] == n)
                for n in ("qkv", "o", "gate_up", "down")
            }  # fmt: skip
        record(row, a.output)


if __name__ == "__main__":
    main()
