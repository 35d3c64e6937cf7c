"""A dense pack cut into nested experts in its own order of neurons, without an add-on: for times of shapes
whose weights are random (`outsize bench synthetic`), where an order, or a router, would say nothing.

    python -m experiments.engine.nested_cut MODEL --pieces 4"""

from __future__ import annotations

import torch

from experiments.runs import arguments
from outsize.adapt.nested.cut import cut
from outsize.pack import fetch
from outsize.progress import bars


def main() -> None:
    args = arguments(__doc__, "model", pieces=4)
    base = fetch.find(args.model) or fetch.pack(args.model)
    d = base.description
    order = torch.arange(d.ffn_width, dtype=torch.int64).expand(d.num_layers, -1)
    with bars(False) as progress:
        print(cut(base, args.pieces, order, progress).path)


if __name__ == "__main__":
    main()
