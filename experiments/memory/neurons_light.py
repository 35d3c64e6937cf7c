"""The speed of light of paged neurons: bytes a token from disk at each step, by arithmetic from a model's
sizes alone.

    python -m experiments.memory.neurons_light -o experiments/results/epyc-2core/neurons-light.jsonl

Steps as in LLM in a flash (arXiv 2312.11514): naive (every weight), half held (pin-and-ring), with a
predictor (all but the feed-forward held, of it the share that is predicted), with what the rest of the
half then holds of it, and with records padded to pages. No cache is cleverer here than chance: a bundle
is held with the same chance whether it fires often or not; OPT's window is the paper's."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.runs import Row, arguments, record

PAGE, PREDICTOR = 4096, 0.04  # bytes; share of the feed-forward that a predictor takes


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's bytes: of the feed-forwards, of all else that a token reads; of one bundle, and how many
    there are."""

    name: str
    ffn: int
    rest: int
    bundle: int
    count: int
    fires: float  # share of the neurons that are read for a token
    window: float | None = None  # the same with a window, where it was published


# Bytes as the packs have them (`outsize plan`). OPT-6.7B: 32 layers of 2 * 4096 * 16384 and 4 * 4096 * 4096.
SHAPES = (
    Shape("SmolLM2 135M, 32 neighbours", 49_889_280, 47_862_000, 34_560, 48 * 30, 0.5),
    Shape("SmolLM2 135M, 8 by use", 49_889_280, 47_862_000, 10_960, 192 * 30, 0.5),
    Shape("Qwen2.5 0.5B, 32 neighbours", 217_055_232, 176_094_000, 59_500, 152 * 24, 0.5),
    Shape("Qwen2.5 0.5B, 16 by use", 217_055_232, 176_094_000, 34_080, 304 * 24, 0.5),
    Shape(
        "OPT-6.7B, 16 bits, each neuron", 8_589_934_592, 4_706_000_000, 16_384, 1 << 19, 0.10, 0.024
    ),
    Shape(
        "OPT-6.7B, 4.5 bits, each neuron", 2_415_919_104, 1_323_800_000, 4_608, 1 << 19, 0.10, 0.024
    ),
)


def row(s: Shape) -> Row:
    """All steps, in MB."""
    half, paged = (s.ffn + s.rest) / 2, s.bundle * s.count
    room = max(0.0, half - s.rest - PREDICTOR * s.ffn)
    held = min(1.0, room / paged)
    window = paged * (s.fires * (1 - held) if s.window is None else s.window)
    padded = -(-s.bundle // PAGE) * PAGE / s.bundle
    return {
        "model": s.name,
        "naive": (s.ffn + s.rest) / 1e6,
        "half_held": half / 1e6,
        "ffn_share": s.ffn / (s.ffn + s.rest),
        "paged": paged / 1e6,
        "predictor": s.fires * paged / 1e6,
        "held_share": held,
        "window": window / 1e6,
        "padded": padded,
        "bundles": window * padded / 1e6,
        "times_fewer": half / (window * padded),
    }


def main() -> None:
    output = arguments(__doc__).output
    for shape in SHAPES:
        record(row(shape), output)


if __name__ == "__main__":
    main()
