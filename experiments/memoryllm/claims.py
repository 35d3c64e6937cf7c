"""What trained arms say of the paper's claims: `python -m experiments.memoryllm.claims FOLDER TEXT... -o
ROWS.jsonl [--seeds 0 1 2] [--config mini] [--parts layers scales tables clusters]`, FOLDER and TEXT those of
arms.py. All on held-out sequences from all of the text, evenly.

    layers    one layer's feed-forward left out, of base and memory; then, greedily, one after another
    scales    all feed-forwards times less: nats and hits on all tokens, on "facts" (the training text nearly
              always goes on so after these three tokens, and the sequence has not shown it) and on "copies"
              (the sequence has shown it, and it is not what the training text has most)
    tables    through the engine: tables of 16, 8 and 4 bits, and of low ranks, alike and by layer
    clusters  k-means of a layer's coefficients, of embeddings, and of those of an untrained model: how much
              they say of tokens' forms, and of the next token's cluster
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, normalize, rms_norm, silu

import outsize
from experiments.memoryllm.arms import recipe_of, text_of
from experiments.memoryllm.probes import Probes, form, information, shared_information
from experiments.runs import Row, arguments, record
from outsize.adapt.memory.inspect import clusters
from outsize.adapt.memory.network import (
    EMBED,
    EPS,
    Parameters,
    Shape,
    forward,
    memory_norm,
    new_parameters,
)
from outsize.adapt.memory.tables import TableOptions, make_tables
from outsize.adapt.memory.text import Text
from outsize.engine.scoring import scored
from outsize.pack import fetch

SEQUENCES, LENGTH, CLUSTERS = 64, 256, 24
ARMS = "base", "memory"
SCALES = 1.0, 0.9, 0.8, 0.7, 0.6, 0.5
RANKS = 0.875, 0.75, 0.5


def held_out(text: Text) -> Tensor:
    """(R, LENGTH + 1) tokens, from all of what is held out."""
    rows = text.held_out.long().unfold(0, LENGTH + 1, LENGTH + 1)
    return rows[:: -(-len(rows) // SEQUENCES)]


@torch.inference_mode()
def judged(p: Parameters, shape: Shape, rows_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token after the first: nats, and whether it was the likeliest (R, LENGTH)."""
    nats, hits = list[Tensor](), list[Tensor]()
    for some in rows_RS.split(8):
        logits = linear(forward(p, shape, some[:, :-1]), p[EMBED])
        right = logits.gather(-1, some[:, 1:, None])[..., 0]
        nats.append(logits.logsumexp(-1) - right)
        hits.append(logits.argmax(-1) == some[:, 1:])
    return torch.cat(nats), torch.cat(hits)


def scaled(p: Parameters, by: Mapping[int, float]) -> dict[str, Tensor]:
    """What the feed-forwards of these layers give, times so much; 0: left out."""
    out = dict(p)
    for layer, factor in by.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        out[name] = p[name] * factor
    return out


def layers(p: Parameters, shape: Shape, rows: Tensor) -> Row:
    """Nats with one layer left out, and with ever more, the least harmful next."""

    def nats(off: Sequence[int]) -> float:
        return round(float(judged(scaled(p, dict.fromkeys(off, 0.0)), shape, rows)[0].mean()), 4)

    whole, gone, path = nats([]), list[int](), list[list[float]]()
    first = {layer: nats([layer]) for layer in range(shape.layers)}
    now = first
    while len(gone) < shape.layers:
        least = min(now, key=lambda layer: now[layer])
        gone.append(least)
        path.append([least, now[least]])
        now = {i: nats([*gone, i]) for i in range(shape.layers) if i not in gone}
    return {"nats": whole, "without": list(first.values()), "greedy": path}


def scales(p: Parameters, shape: Shape, rows: Tensor, probes: Probes) -> Iterator[Row]:
    sets = {"all": torch.ones_like(rows[:, 1:], dtype=torch.bool)}
    sets |= {"facts": probes.facts(rows), "copies": probes.copies(rows)}
    for scale in SCALES:
        found = judged(scaled(p, dict.fromkeys(range(shape.layers), scale)), shape, rows)
        for name, at in sets.items():
            nats, hits = (float(x[at].float().mean()) for x in found)
            told = {"set": name, "tokens": int(at.sum()), "nats": round(nats, 4)}
            yield {"scale": scale, **told, "hits": round(hits, 4)}


def tables(folder: Path, rows: Tensor) -> Iterator[Row]:
    """Perplexities of packs, as the engine computes them."""
    base = fetch.pack(str(folder), encoding="fp32", quiet=True)
    yield {"bits": 0, "rank": 1.0, "by_layer": False, "nats": nats_of(str(base.path), rows)}
    whole = [TableOptions(bits=bits, quiet=True) for bits in (16, 8, 4)]
    cut = [TableOptions(16, r, by, quiet=True) for r in RANKS for by in (False, True)]
    for options in [*whole, *cut]:
        pack = make_tables(base, options).pack
        (table,) = [t for t in pack.tables if t.kind == "tokens"]
        d, memory = pack.description, pack.description.memory
        yield {
            "bits": options.bits, "rank": options.rank or 1.0, "by_layer": options.by_layer,
            "nats": nats_of(str(pack.path), rows), "table_bytes": table.size,
            "numbers": d.vocab_size * d.num_layers * d.width,
            "ffn_numbers": 3 * d.num_layers * d.width * d.ffn_width,
            "ranks": list(memory.ranks) if memory is not None else [],
        }  # fmt: skip


def nats_of(pack: str, rows: Tensor) -> float:
    total = count = 0.0
    with outsize.load(pack, quiet=True, draft="none", context=LENGTH + 8) as model:
        for row in rows.tolist():
            for some in scored(model.transformer, row):
                total -= sum(one.token.logprob for one in some)
                count += len(some)
    return round(total / count, 5)


def coefficients(p: Parameters, layer: int) -> Tensor:
    """(V, F) of a layer's keys, by token."""
    name, norm = f"model.layers.{layer}.mlp", p[memory_norm(layer)]
    q_VD = rms_norm(p[EMBED], norm.shape, norm, EPS)
    return silu(q_VD @ p[f"{name}.gate_proj.weight"].T) * (q_VD @ p[f"{name}.up_proj.weight"].T)


def clustered(p: Parameters, shape: Shape, text: Text, forms: Tensor) -> Iterator[Row]:
    """What clusters say: of coefficients by layer, and of embeddings (layer -1)."""
    points = {-1: p[EMBED]} | {i: coefficients(p, i) for i in range(shape.layers)}
    ids = text.held_out.long()
    for layer, x in points.items():
        label_V = clusters(normalize(x), CLUSTERS)
        label_T = label_V[ids]
        yield {
            "layer": layer, "clusters": len(label_V.unique()),
            "largest": round(float(label_V.bincount().max()) / len(label_V), 4),
            "forms": round(shared_information(label_V, forms), 4),
            "next": round(information(label_T[:-1], label_T[1:]), 4),
        }  # fmt: skip


def main() -> None:
    told = arguments(
        __doc__, "folder", "texts+", seeds=[0], config="mini",
        parts=["layers", "scales", "tables", "clusters"],
    )  # fmt: skip
    torch.set_num_threads(1)
    folder = Path(told.folder)
    text = text_of(folder, [Path(t) for t in told.texts], told.config)
    rows, probes = (
        held_out(text),
        Probes(text.train.numpy(), recipe_of("base", told.config, 0).shape().vocab),
    )
    forms = torch.tensor([form(t) for t in pieces(text)], device="cpu")
    for seed in told.seeds:
        for arm in ARMS:
            shape, at = recipe_of(arm, told.config, seed).shape(), folder / f"{arm}-{seed}"
            p = {k: v.float() for k, v in load_file(at / "model.safetensors").items()}
            about: Row = {"arm": arm, "seed": seed}
            if "layers" in told.parts:
                record({"what": "layers"} | about | layers(p, shape, rows), told.output)
            if "scales" in told.parts:
                for row in scales(p, shape, rows, probes):
                    record({"what": "scales"} | about | row, told.output)
            if arm == "base":
                continue
            if "tables" in told.parts:
                for row in tables(at, rows):
                    record({"what": "tables"} | about | row, told.output)
            if "clusters" in told.parts:
                for name, q in (("trained", p), ("untrained", new_parameters(shape, seed))):
                    for row in clustered(q, shape, text, forms):
                        record({"what": "clusters", "of": name} | about | row, told.output)


def pieces(text: Text) -> list[str]:
    """Each token as text."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(text.tokenizer)
    return [made.decode([i], skip_special_tokens=False) for i in range(made.get_vocab_size())]


if __name__ == "__main__":
    main()
