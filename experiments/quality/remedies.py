"""What might make palettes lose less: `python -m experiments.quality.remedies MODEL TEXT GSM8K --arms ...`.

Every matrix of the layers in one size each, as experiments/quality/palettes.py has it, and then otherwise:

    palette:B         as it is
    damping:B:SHARE   error feedback with another damping (it is .03)
    sc:B, slcslc:B    after feedback: s, steps by least squares in H; l, levels likewise; c, each code in turn
                      the best with all others as they are
    follow:B:SHARE    layer by layer, fitted to the inputs that the layers before leave, and to the outputs
                      there were; with this damping
    text:B:NAME       fitted to another text: gsm8k, own (the model's), both+gsm8k, both+own (half TEXT)
    from:B:TYPE:NAMES these tensors (qkv,o,gate_up,down) in a GGUF type by llama.cpp's quantizer (--ggml)
    only:B:NAMES      only these tensors;  only-ggml:TYPE:NAMES

Shapes: N rows, K inputs, J tiles of 16 rows, G groups, L levels.
"""

from __future__ import annotations

import ctypes
import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.quality.palettes import measured, theirs, tokens_of
from experiments.runs import arguments, record
from outsize.adapt import calibration, palettes
from outsize.adapt.calibration import due, start_of
from outsize.adapt.change import Change
from outsize.adapt.fewer_bits import Over
from outsize.adapt.palettes import Factor, encoding_of, feedback
from outsize.adapt.statistics import (
    AT_ONCE,
    FIRST,
    LENGTH,
    SHORT,
    TENSORS,
    WEIGHT,
    Inputs,
    causal,
    sequences,
)
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.encoding.levels import MOST, between, fit
from outsize.encoding.palette import Palette
from outsize.engine import open_tokens
from outsize.kernels.palettes import FORMS, TILE
from outsize.pack import fetch
from outsize.progress import silent
from outsize.storage.records import Records

ARMS = "palette:3 damping:3:0.1 slcslc:3 follow:3:0.03 palette:4 damping:4:0.1 sc:4 text:4:gsm8k"
RIDGE = 1e-3  # of a refit, of the diagonal
Moments = dict[str, Tensor]


@dataclass
class Rounding:
    """A matrix on its way: w ~ step * levels[code], errors counted in H (K, K)."""

    w_NK: Tensor
    moment_KK: Tensor
    palette: Palette
    step_NG: Tensor
    levels_JL: Tensor
    code_NK: Tensor

    @classmethod
    def begun(cls, w: Tensor, factor: Factor, size: int) -> Rounding:
        name = encoding_of(size, w.shape[1])
        palette = Palette(name, FORMS[name])
        fitted = fit(palette.form, w, factor.moment.diagonal())
        fitted = fitted._replace(step_NG=palette.rounded(fitted.step_NG)[1])
        codes = feedback(w, fitted, factor, palette.form.group)
        moment = factor.moment.clone()
        moment.diagonal().add_(palettes.DAMPING * float(moment.diagonal().mean()))
        return cls(w, moment, palette, fitted.step_NG, fitted.levels_JL, codes)

    def steps(self) -> Tensor:
        """(N, K)"""
        return self.step_NG.repeat_interleave(self.palette.form.group, dim=1)

    def unscaled(self) -> Tensor:
        tiles = self.code_NK.long().view(len(self.levels_JL), -1)
        return self.levels_JL.float().gather(1, tiles).view_as(self.w_NK)

    def numbers(self) -> Tensor:
        return self.unscaled() * self.steps()

    def refit_steps(self) -> None:
        x, group = self.unscaled(), self.palette.form.group
        rows, width = x.shape
        parts = [x[:, s].matmul(self.moment_KK[s]) * x for s in _slices(width, group)]
        a = torch.stack([p.view(rows, -1, group).sum(dim=2) for p in parts], dim=1)
        pull = ((self.w_NK @ self.moment_KK) * x).view(rows, -1, group).sum(dim=2)
        moved = _solved(a, pull - (a @ self.step_NG[..., None])[..., 0])
        self.step_NG = self.palette.rounded((self.step_NG + moved).clamp_min(0))[1]

    def refit_levels(self) -> None:
        tiles, count = self.levels_JL.shape
        step, code = self.steps(), self.code_NK.long().view(tiles, -1)
        a = torch.zeros(tiles, count, count)
        for level in range(count):
            drawn = ((self.code_NK == level) * step) @ self.moment_KK * step
            a[:, level].scatter_add_(1, code, drawn.view(tiles, -1))
        wanted = ((self.w_NK @ self.moment_KK) * step).view(tiles, -1)
        pull = torch.zeros(tiles, count).scatter_add_(1, code, wanted)
        levels = self.levels_JL.float()
        levels, at = (levels + _solved(a, pull - (a @ levels[..., None])[..., 0])).sort(dim=1)
        top = levels.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        self.levels_JL = (levels * (MOST / top)).round().to(torch.int8)
        self.code_NK = at.argsort(dim=1).gather(1, code).view_as(self.w_NK).to(torch.uint8)
        step_NG = self.step_NG * (top / MOST).repeat_interleave(TILE, dim=0)
        self.step_NG = self.palette.rounded(step_NG)[1]

    def improve_codes(self, order_K: Tensor) -> None:
        """Each column's codes once, the best with all others as they are."""
        h = self.moment_KK[order_K][:, order_K]
        missed = (self.w_NK - self.numbers()).T[order_K]
        drawn, now = h @ missed, self.numbers().T[order_K].contiguous()
        step = self.steps().T[order_K].contiguous()
        levels, cuts = self.levels_JL.float(), between(self.levels_JL)
        codes = self.code_NK.T[order_K].contiguous()
        for k in range(len(order_K)):
            wanted = now[k] + drawn[k] / h[k, k]
            code = torch.searchsorted(cuts, (wanted / step[k].clamp_min(1e-30)).view(-1, TILE))
            new = levels.gather(1, code).flatten() * step[k]
            drawn.addr_(h[:, k], new - now[k], alpha=-1)
            now[k], codes[k] = new, code.flatten().to(torch.uint8)
        back = torch.empty_like(codes)
        back[order_K] = codes
        self.code_NK = back.T.contiguous()


def _slices(width: int, group: int) -> Iterator[slice]:
    return (slice(start, start + group) for start in range(0, width, group))


def _solved(a: Tensor, b: Tensor) -> Tensor:
    diagonal = a.diagonal(dim1=1, dim2=2)
    more = RIDGE * diagonal + 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-20
    solved: Tensor = torch.linalg.solve(a + torch.diag_embed(more), b)
    return solved


class Tap(Change):
    """Other weights in one layer; and what enters each map, of positions that count."""

    def __init__(self, weights: Moments, skip: int) -> None:
        self._weights, self._skip = weights, skip
        self.rows: dict[str, list[Tensor]] = {}

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        self.rows.setdefault(name, []).append(x[:, self._skip :].flatten(0, 1))
        return self._weights.get(name, w)


class Follower:
    """The streams of the model, and of the one whose layers so far are rounded."""

    def __init__(self, model: TrainableModel, tokens: Sequence[int], start: Sequence[int]) -> None:
        self._model = model
        short = sequences(tokens, start, FIRST)
        short = short[:: max(1, len(short) // SHORT)][:SHORT]
        both = sequences(tokens, start, LENGTH), short
        self._former = [[model.embed(x) for x in t.split(AT_ONCE // t.shape[1])] for t in both]
        self._now = [list(parts) for parts in self._former]

    def inputs(self, layer: int, weights: Moments, is_former: bool) -> list[dict[str, Tensor]]:
        """Of whole sequences, and of first positions."""
        out = []
        for skip, parts in zip((FIRST, 0), self._former if is_former else self._now, strict=True):
            tap = Tap(weights, skip)
            for h in parts:
                self._model.through(causal(h), range(layer, layer + 1), tap)
            out.append({name: torch.cat(x) for name, x in tap.rows.items()})
        return out

    def advance(self, layer: int, weights: Moments) -> None:
        for streams, tap in ((self._former, Tap({}, 0)), (self._now, Tap(weights, 0))):
            for parts in streams:
                for i, h in enumerate(parts):
                    parts[i] = self._model.through(causal(h), range(layer, layer + 1), tap)


def second(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    counts = zip((1 - WEIGHT, WEIGHT), a, b, strict=True)
    return torch.stack([c * (x.float().T @ y.float()) / len(x) for c, x, y in counts]).sum(dim=0)


class Remedies:
    """One model's arms."""

    def __init__(self, model: str, text: Path, gsm: Path, ggml: str) -> None:
        self.pack, self._gsm = fetch.pack(model, quiet=True), gsm
        device = torch.device("cpu")
        self.model = TrainableModel(self.pack, device, matmul_type(device), silent)
        self.words, self.other = tokens_of(model, text, gsm)
        self.start, self.need = start_of(self.pack), due(self.pack.description)
        self.fit_to = self.words[8192 : 8192 + self.need]
        self.records = Records(self.pack)
        self._ggml = ctypes.CDLL(ggml) if ggml else None

    def text(self, name: str) -> list[int]:
        if name.startswith("both+"):
            half = self.need // 2
            return self.fit_to[:half] + self.text(name.removeprefix("both+"))[:half]
        if name == "own":
            return list(calibration.own(self.pack, self.model, 0, silent).tokens)
        with gzip.open(self._gsm, "rt") as f:
            lines = [json.loads(line) for line in itertools.islice(f, 200, 1000)]
        said = "\n\n".join(f"Question: {x['question']}\nAnswer: {x['answer']}" for x in lines)
        return open_tokens.tokens(self.pack).encode(said, start=False)[: self.need]

    def made(self, arm: str) -> dict[tuple[int, str], Tensor]:
        kind, what, *more = arm.split(":")
        if kind == "follow":
            palettes.DAMPING = float(more[0])
            return self._followed(int(what))
        palettes.DAMPING = float(more[0]) if kind == "damping" else 0.03
        tokens = self.text(more[0]) if kind == "text" else self.fit_to
        inputs, out = Inputs(self.model, tokens, self.start), {}
        named = (more[-1] if more else "").split(",")
        for layer in range(self.pack.description.num_layers):
            for name, moment in inputs.next().items():
                if kind.startswith("only") and name not in named:
                    continue
                w, is_theirs = self.records.layer(layer, name), kind == "only-ggml"
                if is_theirs or (kind == "from" and name in named):
                    assert self._ggml is not None
                    found = theirs(self._ggml, what if is_theirs else more[0], w, Factor(moment))[0]
                else:
                    found = self._one(kind, int(what), w, Factor(moment))
                out[layer, name] = found.to(self.model.dtype)
        return out

    def _one(self, kind: str, size: int, w: Tensor, factor: Factor) -> Tensor:
        rounding = Rounding.begun(w, factor, size)
        for letter in kind if set(kind) <= set("slc") else "":
            if letter == "c":
                rounding.improve_codes(factor.order)
            else:
                {"s": rounding.refit_steps, "l": rounding.refit_levels}[letter]()
        return rounding.numbers()

    def _followed(self, size: int) -> dict[tuple[int, str], Tensor]:
        """Targets: w (X Y^T) (Y Y^T)^-1, of inputs X there were and Y there are."""
        follower, out = Follower(self.model, self.fit_to, self.start), {}
        for layer in range(self.pack.description.num_layers):
            before, done = follower.inputs(layer, {}, True), dict[str, Tensor]()
            for name in TENSORS:
                x = [part[name] for part in before]
                y = [part[name] for part in follower.inputs(layer, done, False)]
                moment, w = second(y, y), self.records.layer(layer, name)
                damped = moment.clone()
                damped.diagonal().add_(palettes.DAMPING * float(moment.diagonal().mean()))
                drift = second([a - b for a, b in zip(x, y, strict=True)], y)
                target = w + w @ torch.linalg.solve(damped, drift.T).T
                found = self._one("palette", size, target, Factor(moment)).to(self.model.dtype)
                done[name] = out[layer, name] = found
            follower.advance(layer, done)
        return out


@torch.inference_mode()
def main() -> None:
    a = arguments(__doc__, "model", "text", "gsm", arms=ARMS.split(), ggml="")
    r = Remedies(a.model, Path(a.text), Path(a.gsm), a.ggml)
    texts = {"wikitext": r.words[:1024], "gsm8k": r.other}
    measures = {n: measured(r.model, sequences(x, r.start, LENGTH)) for n, x in texts.items()}
    with r.records:
        for arm in a.arms:
            over = Over(r.made(arm))
            row = {"model": r.pack.path.name, "arm": arm, "fitted_to": r.need}
            record(row | {name: measure(over) for name, measure in measures.items()}, a.output)


if __name__ == "__main__":
    main()
