"""How the codes of encoded matrices lie in memory, and how torch reads them; csrc/ reads the same layouts.

`tile64` (int4): rows in blocks of 64; in a block, for each input, 32 bytes whose low nibbles are rows 0-31
and whose high nibbles are rows 32-63. It is what torch's AVX-512 kernel reads. Groups (4, 5 or 8 bits):
blocks of 64 weights of a row, groups A and B. 4 bits: 32 bytes a block, low nibbles A, high nibbles B; 5
bits: likewise, and the fifth bits of the 64 apart; 8 bits: a byte a weight.

Shapes: N rows, K inputs, G groups of 32 inputs, B blocks of 64 rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

GROUP, BLOCK = 32, 64
TILES = 0  # the number of bits that says int4 tiles


class CodedMatrix(NamedTuple):
    """An encoded matrix w (rows, width) in memory, for any backend: in groups of `bits`, or TILES.

    Tiles: codes (B, K, 32), scale (G, N, 2) bf16, step and zero: w = step * (code - 8) + zero.
    Groups: codes (N, bytes), scale (N, G) fp16: w = scale * (code - 2 ** (bits - 1)).
    """

    bits: int
    rows: int
    width: int
    codes: Tensor
    high: Tensor | None  # the fifth bits
    scale: Tensor

    def some(self, start: int, stop: int) -> CodedMatrix:
        """Some rows of a matrix in groups: views, no copy."""
        high = None if self.high is None else self.high[start:stop]
        codes, scale = self.codes[start:stop], self.scale[start:stop]
        return CodedMatrix(self.bits, stop - start, self.width, codes, high, scale)


def tile(code_NK: Tensor) -> Tensor:
    """(N, K) codes -> (B, K, 32) bytes."""
    blocks = code_NK.view(-1, 2, BLOCK // 2, code_NK.shape[1])
    return (blocks[:, 0] | blocks[:, 1] << 4).transpose(1, 2).contiguous()


def untile(packed: Tensor) -> Tensor:
    """(B, K, 32) bytes -> (N, K) codes."""
    blocks = torch.stack([packed & 15, packed >> 4], dim=1)
    return blocks.transpose(2, 3).reshape(-1, packed.shape[1])


@cache
def torch_reads_tiles() -> bool:
    """Does torch's int4 kernel on this machine read our layout? Elsewhere it would misread every weight, and
    without our own only decoding is left."""
    codes = torch.arange(BLOCK * GROUP, dtype=torch.int32, device="cpu").view(BLOCK, GROUP) * 7 % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(theirs.flatten(), tile(codes.to(torch.uint8)).flatten())


def decode_tiles(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, N) numbers. Flipping each nibble's top bit makes it a signed code - 8."""
    signed_KBb = (packed ^ 0x88).view(torch.int8).transpose(0, 1)
    num_inputs, num_blocks, half = signed_KBb.shape
    codes = torch.empty(num_inputs, num_blocks, BLOCK, dtype=dtype, device="cpu")
    codes[:, :, :half] = (signed_KBb << 4) >> 4
    codes[:, :, half:] = signed_KBb >> 4
    step, zero = scales.to(dtype).unbind(2)
    grouped = codes.view(-1, GROUP, num_blocks * BLOCK)
    return torch.addcmul(zero[:, None], grouped, step[:, None]).view(num_inputs, -1)


def decode_groups(bits: int, codes: Tensor, high: Tensor | None, scale: Tensor) -> Tensor:
    """(N, K) fp32."""
    if bits < 8:
        blocks = codes.view(len(codes), -1, 1, GROUP)
        codes = torch.cat([blocks & 15, blocks >> 4], dim=2).flatten(1)
    if high is not None:
        shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
        codes = codes | (((high[:, :, None] >> shifts) & 1) << 4).flatten(1)
    grouped = codes.float().view(len(codes), -1, GROUP).sub_(1 << (bits - 1))
    return grouped.mul_(scale.float()[:, :, None]).flatten(1)
