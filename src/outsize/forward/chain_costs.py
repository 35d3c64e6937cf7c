"""What a chain's prompts cost, measured when its ranks have come: a layer's time on each, and the link."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from outsize.forward import words
from outsize.forward.inputs import token_inputs
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer
from outsize.parallel.cuts import Costs
from outsize.parallel.programs import Prompt
from outsize.parallel.slow import Link
from outsize.parallel.transport import Transport, others

DEPTH = 2048  # tokens before those that are measured
TRIES = 3
Of = Callable[[Sequence[float]], float]  # of some tries, what counts
PINGS, LARGE = 10, 256 << 10  # exchanges of a few bytes, and one message of so many
PICO = 1e12  # seconds are told as whole numbers of these
LEADER = 0


@torch.inference_mode()
def measured(model: Transformer, tries: int = TRIES, of: Of = min) -> Prompt:
    """Seconds a token and a (query, key) pair, of all layers, on this rank: of each half of a layer the
    fastest of some tries, or what else is made `of` them."""
    d = model.description
    windows = [layer.window for layer in d.layers]
    full = [i for i, window in enumerate(windows) if window is None]
    layer, rows = (full or [0])[0], model.chunk
    kv = model.new_kv()
    _, num_heads, _, width = kv.like.shape
    model.begin(True)
    at_once = _layer_s(model, kv, (layer, 0), tries, of)
    kv.truncate(0)
    kv.append_entries(layer, kv.like.new_zeros(num_heads, DEPTH, width))
    deep = _layer_s(model, kv, (layer, DEPTH), tries, of)
    pair_s = max(0.0, deep[0] - at_once[0]) / (rows * DEPTH)
    linear_s = max(1e-12, (sum(at_once) - pair_s * rows * rows / 2) / rows)
    each = num_heads * width * kv.like.element_size()
    return Prompt(linear_s * d.num_layers, pair_s * len(full), d.num_layers, each, 4 * d.width)


def _layer_s(
    model: Transformer, kv: KV, place: tuple[int, int], tries: int, of: Of
) -> tuple[float, float]:
    """Seconds of a layer's two halves, for a chunk after so many tokens."""
    layer, start = place
    d, rows = model.description, model.chunk
    h_TD = torch.zeros(rows, d.width, dtype=torch.float32, device="cpu")
    h_TD.view(-1)[:: d.width + 1] = 1.0
    inputs = token_inputs(model, [0] * rows)(h_TD, slice(0, rows))
    took: tuple[list[float], list[float]] = [], []
    for _ in range(tries):
        kv.truncate(start)
        step = model.step([Segment(kv, range(start, start + rows))], True, (), (), inputs)
        for half in (0, 1):
            began = time.perf_counter()
            model.paged_layers[2 * layer + half]([(h_TD, step)])
            took[half].append(time.perf_counter() - began)
    return of(took[0]), of(took[1])


def tell(model: Transformer, transport: Transport) -> None:
    """Of a rank that follows: what it measured; the last one also answers, so that its link is measured."""
    own = measured(model)
    costs = [round(own.linear_s * PICO), round(own.pair_s * PICO)]
    words.send(transport, [LEADER], costs)
    if transport.rank == transport.world - 1:
        ping = bytearray(8)
        for _ in range(PINGS):
            transport.receive(LEADER, ping)
            transport.send(LEADER, ping).wait()
        transport.receive(LEADER, ping)
        transport.send(LEADER, bytes(LARGE)).wait()


def hear(model: Transformer, transport: Transport) -> Costs:
    """Of the leader, while the others `tell`: the chain, first rank first, itself last."""
    own = measured(model)
    told = [words.receive(transport, rank) for rank in others(LEADER, transport.world)]
    first = Prompt(
        max(1.0, told[0][0]) / PICO, told[0][1] / PICO, own.layers, own.kv_bytes, own.row_bytes
    ) if told else own  # fmt: skip
    works = [float(linear + pair * DEPTH) for linear, pair in told]
    works.append((own.linear_s + own.pair_s * DEPTH) * PICO)
    speeds = tuple(works[0] / max(1.0, work) for work in works)
    link = _link(transport) if told else Link(0.0, float("inf"))
    return Costs(first, link, speeds)


def _link(transport: Transport) -> Link:
    """Of the chain's last two ranks."""
    peer, best = transport.world - 1, float("inf")
    ping, large = bytearray(8), bytearray(LARGE)
    for _ in range(PINGS):
        began = time.perf_counter()
        transport.send(peer, ping).wait()
        transport.receive(peer, ping)
        best = min(best, (time.perf_counter() - began) / 2)
    began = time.perf_counter()
    transport.send(peer, ping).wait()
    transport.receive(peer, large)
    took = max(1e-6, time.perf_counter() - began - 2 * best)
    return Link(best, LARGE / took)
