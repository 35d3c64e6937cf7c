"""Cut a mask drafter's factors to a lower rank: `python -m experiments.drafting.mtp_rank IN OUT --rank 8`.

Of each product of two factors the largest singular values stay, the root of each in either factor. One JSON
object: bytes before and after, and the share of the products' squares that is lost.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.runs import arguments, record
from outsize.adapt import checkpoints
from outsize.checkpoint import lora as adapters


def cut(a_RK: Tensor, b_NR: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of the nearest product of that rank, and the share of its squares that is lost."""
    left_NR, upper_RR = torch.linalg.qr(b_NR.double())
    right_KR, lower_RR = torch.linalg.qr(a_RK.double().T)
    u_RR, values_R, v_RR = torch.linalg.svd(upper_RR @ lower_RR.T)
    root = values_R[:rank].sqrt()
    a = root[:, None] * (v_RR[:rank] @ right_KR.T)
    b = (left_NR @ u_RR[:, :rank]) * root
    lost = values_R[rank:].square().sum() / values_R.square().sum().clamp_min(1e-300)
    return a.to(a_RK.dtype).contiguous(), b.to(b_NR.dtype).contiguous(), float(lost)


def main() -> None:
    a = arguments(__doc__, "file", "out", rank=int)
    file, out = adapters.load(Path(a.file)), Path(a.out)
    tensors, lost = dict(file.tensors), []
    for name in file.factors():
        factors = tensors[f"{name}.A"], tensors[f"{name}.B"]
        tensors[f"{name}.A"], tensors[f"{name}.B"], share = cut(*factors, a.rank)
        lost.append(share)
    checkpoints.save(out, tensors, {**file.about, "cut_to_rank": a.rank})
    sizes = {"bytes": file.path.stat().st_size, "bytes_cut": out.stat().st_size}
    record(sizes | {"rank": a.rank, "lost": round(sum(lost) / len(lost), 4)}, a.output)


if __name__ == "__main__":
    main()
