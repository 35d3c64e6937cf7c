"""Quantized safetensors stand for the numbers that their formats define, and are packed without changing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import outsize
from outsize.checkpoint.checkpoint import read_floats
from outsize.checkpoint.opening import open_checkpoint
from outsize.encoding.find import ENCODINGS, encoding
from outsize.family.find import recipe
from outsize.pack.encode import encode
from outsize.pack.layout import plan
from tests.checkpoint import quantizers
from tests.checkpoint.quantizers import FORMATS
from tests.golden import tiny
from tests.golden.test_golden import logits


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_formats(name: str, tmp_path: Path) -> None:
    how = FORMATS[name]
    found = open_checkpoint(quantizers.write_folder(tmp_path / "q", "llama", how)).tensors
    for stem, w in tiny.weights("llama").items():
        if quantizers.is_quantized(stem, w.shape):
            _, numbers = how.quantize(torch.from_numpy(w))
            assert found[stem].shape == w.shape
            np.testing.assert_array_equal(read_floats(found[stem]), numbers.numpy())
    kinds = {t.kind.name for t in found.values() if t.joined is not None}
    assert how.encoding in kinds or not how.encoding
