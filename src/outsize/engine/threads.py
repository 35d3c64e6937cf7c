"""Threads of the kernels, for an opened model."""

from __future__ import annotations

import torch

from outsize.encoding.find import NATIVE
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.kernels.threads import Threads, look
from outsize.options import LoadOptions
from outsize.pack.format import Pack

MOSTLY = 0.9  # of a pack's bytes: then what kernels do not compute is small


def kernel_threads(options: LoadOptions, made: Pack, native: Backend) -> Threads:
    """As many as the user says, or as the machine has free."""
    looks = look if options.threads is None else (lambda: None)
    alone = native is not PLAIN and made.share_of(NATIVE) > MOSTLY
    return Threads(torch.get_num_threads(), looks, alone=alone)
