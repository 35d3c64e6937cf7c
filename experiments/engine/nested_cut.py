"""The shape of a 7B model, of so many of its 32 layers, with random weights; and the same cut into nested
experts in its own order of neurons, without an add-on: an order, or a router, would say nothing of such
weights, and a width is then the same share for all tokens. Prints where both packs are.

    python -m experiments.engine.nested_cut --layers 8 -o FOLDER"""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.runs import arguments
from outsize.adapt.nested.cut import cut
from outsize.bench.synthetic import gguf, shapes
from outsize.pack import fetch
from outsize.progress import bars


def main() -> None:
    args = arguments(__doc__, layers=8, pieces=4, seed=1)
    path = args.output / f"7b-{args.layers}-layers.gguf"
    args.output.mkdir(parents=True, exist_ok=True)
    gguf.write(path, "llama", replace(shapes.SIZES["7b"], layers=args.layers), args.seed)
    base = fetch.pack(str(path))
    d = base.description
    order = torch.arange(d.ffn_width, dtype=torch.int64).expand(d.num_layers, -1)
    with bars(False) as progress:
        print(base.path, cut(base, args.pieces, order, progress).path)


if __name__ == "__main__":
    main()
