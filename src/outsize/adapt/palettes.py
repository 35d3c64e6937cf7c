"""A matrix in fewer bits: levels fitted by what goes into it, and each column's error carried to the columns
that are still to be rounded (the rule of GPTQ, arXiv 2210.17323, with a table in place of a grid).

Shapes: N rows (a multiple of 16), K inputs, J tiles of 16 rows, G groups, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from outsize.encoding.find import encoding_of
from outsize.encoding.levels import Fitted, between, fit
from outsize.encoding.palette import Palette
from outsize.errors import DataError
from outsize.kernels.palettes import FORMS, TILE

DAMPING = 0.03  # of the mean square input, added to each: with .01 more tokens are needed
TRIES = 4  # with ten times the damping each
TOGETHER = 64  # columns, whose errors are carried on at once


class Rounded(NamedTuple):
    """A matrix as it will be stored."""

    encoding: str
    fields: dict[str, Tensor]
    error: float  # of its outputs, mean square, relative to the outputs'


class Factor:
    """What error feedback needs of an input's second moment (K, K), for every stack of maps that share it."""

    def __init__(self, moment_KK: Tensor) -> None:
        self.moment = moment_KK
        self.order = moment_KK.diagonal().argsort(descending=True)
        self.upper = _upper(moment_KK[self.order][:, self.order])


def _upper(moment_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse. Raises DataError."""
    mean = float(moment_KK.diagonal().mean())
    for attempt in range(TRIES):
        damped = moment_KK.clone()
        damped.diagonal().add_(DAMPING * 10**attempt * mean + 1e-12)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if failed == 0 and bool(torch.isfinite(upper).all()):
                return upper
    raise DataError("the text gives this model inputs that are no finite numbers; give another one")


def rounded(w_NK: Tensor, factor: Factor, size: int) -> Rounded:
    """A matrix of fp32 in a palette of so many bits. Raises UnsupportedError."""
    name = encoding_of(size, w_NK.shape[1])
    palette = Palette(name, FORMS[name])
    whole = pad(w_NK, (0, 0, 0, -len(w_NK) % TILE))
    fitted = fit(palette.form, whole, factor.moment.diagonal())
    scales, step_NG = palette.rounded(fitted.step_NG)
    fitted = fitted._replace(step_NG=step_NG)
    codes = feedback(whole, fitted, factor, palette.form.group)
    fields = palette.from_codes(codes, scales) | {"levels": fitted.levels_JL}
    missed = palette.decode(fields)[: len(w_NK)] - w_NK
    error = _energy(missed, factor.moment) / max(_energy(w_NK, factor.moment), 1e-30)
    return Rounded(name, fields, error)


def _energy(w_NK: Tensor, moment_KK: Tensor) -> float:
    return float(((w_NK @ moment_KK) * w_NK).sum(dtype=torch.float64))


def feedback(w_NK: Tensor, fitted: Fitted, factor: Factor, group: int) -> Tensor:
    """(N, K) uint8: codes, column by column, those of the largest inputs first."""
    order, upper, (num_rows, width) = factor.order, factor.upper, w_NK.shape
    rest_KN = w_NK.T[order].contiguous()
    step_KN = fitted.step_NG.T.contiguous()[order // group]
    levels, cuts = fitted.levels_JL.float(), between(fitted.levels_JL)
    codes = torch.empty(width, num_rows, dtype=torch.uint8)
    for start in range(0, width, TOGETHER):
        stop = min(start + TOGETHER, width)
        errors = torch.empty(stop - start, num_rows)
        for k in range(start, stop):
            step = step_KN[k]
            x = (rest_KN[k] / step.clamp_min(1e-30)).view(-1, TILE)
            code = torch.searchsorted(cuts, x)
            missed = rest_KN[k] - levels.gather(1, code).flatten() * step
            errors[k - start] = missed / upper[k, k]
            codes[k] = code.flatten()
            rest_KN[k + 1 : stop].addr_(upper[k, k + 1 : stop], errors[k - start], alpha=-1)
        rest_KN[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous()
