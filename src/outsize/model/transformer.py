"""One decoder-only transformer, built from a description and its weights: embedding, sub-layers, head.

What runs the sub-layers, one after another, is a `Forward` (forward/full.py). The residual stream h_TD is
fp32 and is changed in place. Shapes: T tokens, K tokens whose logits are wanted, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.find import gives_fp32
from outsize.kernels.attention import CHUNK, capped
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows, Segment
from outsize.kernels.threads import Threads
from outsize.kv.int8 import Int8KV
from outsize.kv.kv import KV
from outsize.kv.state import states_of
from outsize.model.best import best
from outsize.model.ffn.neurons import PagedNeurons
from outsize.model.layers import cos_sin
from outsize.model.lora import Adapter
from outsize.model.make_ffn import ffn_maker
from outsize.model.memory import WeightMemory
from outsize.model.norms import last_norm, learned_positions
from outsize.model.paged import PagedLayer, link
from outsize.model.predictors.choose import Chooser
from outsize.model.ranks import Leader, Stages
from outsize.model.step import Step, TokenInputs, Watch
from outsize.model.sublayer import attention_sublayer
from outsize.model.width import Nested
from outsize.model_config import Description, Rope
from outsize.parallel.collective import Collective
from outsize.weights.load import Loaded
from outsize.weights.spec import Recorder


class Transformer:
    """Embedding, sub-layers (two a layer, `paged_layers`), head. A sequence's state is in its KV cache."""

    def __init__(
        self,
        description: Description,
        loaded: Loaded,
        backend: Backend = PLAIN,
        ceiling: int | None = None,
        threads: Threads | None = None,
        ranks: Collective | None = None,
    ) -> None:
        """`ceiling`: bytes that the process should not exceed, if returning free memory helps. `threads`:
        how many the backend uses; None: as many as torch has. `ranks`: whom a rank's model is run with."""
        self.description, self.loaded = description, loaded
        self._embed, self._head = loaded.embed, loaded.head
        self.dtype = loaded.activation_type
        self.paged_layers: list[PagedLayer] = []
        mixture = description.mixture
        self.nested = Nested(mixture.count if mixture is not None and mixture.nested else 0)
        for i, (attn, ffn) in enumerate(loaded.layers):
            self.paged_layers.append(
                PagedLayer(partial(attention_sublayer, description, i, ranks=ranks), attn)
            )
            make = ffn_maker(description, i, (loaded, self.nested), ranks)
            self.paged_layers.append(PagedLayer(make, ffn))
        link(self.paged_layers[1::2])
        self._norm = last_norm(description, loaded.final_norm)
        self.positions_PD = learned_positions(loaded.final_norm)
        self._ropes = description.rope_sizes
        self.backend = backend if self.dtype == torch.bfloat16 else PLAIN
        self.chunk = CHUNK  # tokens of a prompt that are computed at once, at multiples of it
        self.kv = "auto"  # how keys and values are kept, or int8
        self.leader: Leader | None = None  # tells other ranks of each step
        self.relay: Stages | None = None  # runs the layers that other ranks have
        self.neurons = ""  # which are computed, and what that costs, where not all are
        self._own, self.threads = backend, threads or Threads(torch.get_num_threads())
        self.memory = WeightMemory(description, loaded, self.paged_layers, ceiling)

    def page_neurons(
        self,
        choosers: Sequence[Chooser],
        recorder: Recorder | None = None,
        takes_resident: bool = False,
    ) -> None:
        """From now on steps of few rows compute only the neurons that are chosen for them (lossy, unless the
        choice is exact), or also those that are in memory. `recorder`: is told what each layer chose."""
        banks = self.loaded.neurons
        for layer, bank, chooser in zip(self.paged_layers[1::2], banks, choosers, strict=True):
            layer.narrow = PagedNeurons(self.description, bank, chooser, recorder, takes_resident)

    def begin(self, is_large: bool) -> None:
        """A step begins; `is_large`: with a long span, or of a batch."""
        self._own.set_threads(self.threads.now())
        self.memory.begin_step(is_large)

    @property
    def waited_s(self) -> float:
        """Seconds that computing has stood still for reads so far."""
        return self.loaded.stats.waited_s + self.loaded.expert_stats.waited_s

    @property
    def steps(self) -> tuple[int, int]:
        """Steps so far, and the threads they had, added up."""
        return self.threads.steps, self.threads.sum

    @property
    def asked(self) -> int:
        """Experts that steps have asked for so far, each once a step and layer."""
        return self.loaded.expert_stats.hits + self.loaded.expert_stats.misses

    def new_kv(self, room: int = 0) -> KV:
        """An empty cache for one sequence; with `room` for so many tokens it never moves."""
        if self.kv == "int8":
            like = new_kv(self.description, self.dtype)
            return Int8KV(like, self.backend.decode_entries, room)
        return new_kv(self.description, self.dtype, room)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, D) fp32, without what is learned of positions."""
        if self.relay is not None and not self.relay.begins:  # room for what another rank sends
            return self._norm.weight.new_empty(len(tokens), self.description.width)
        rows = self._embed.rows(torch.tensor(tokens, dtype=torch.int64, device="cpu"))
        scale = self.description.embed_scale
        return rows if scale == 1.0 else rows.mul_(scale)

    def step(
        self,
        segments: Sequence[Segment],
        wide: bool,
        added: Sequence[tuple[slice, Adapter]] = (),
        watches: Sequence[Watch] = (),
        tokens: TokenInputs | None = None,
    ) -> Step:
        """A step of these rows, whose rotary angles all layers share. `tokens`: where layers read them."""
        positions = [p for s in segments for p in s.all_positions()]
        angles = rotary_angles(self._ropes, positions)
        backend = self.backend.wide if wide else self.backend
        return Step(Rows(segments, wide), angles, backend, added, watches, tokens)

    def normed(self, h_TD: Tensor) -> Tensor:
        """What the head reads."""
        return self._norm(h_TD)

    def logits(self, h_KD: Tensor) -> Tensor:
        """(K, V) fp32 of the residual stream."""
        return self.project(self._norm(h_KD))

    def head_rows(self, ids: Tensor) -> Tensor:
        """(T, D) fp32: what some tokens' logits are products with."""
        return self._head.rows(ids)

    def project(self, x_KD: Tensor) -> Tensor:
        """(K, V) fp32 of normed states. Kernels of int4 and int8 give bf16, whose steps near 20 are 0.125,
        more than often lies between the two best tokens; there each row's best are computed again in fp32."""
        exact = gives_fp32(self._head.encoding) or self.dtype == torch.float32
        logits = self._project(x_KD if exact else x_KD.to(self.dtype), torch.float32)
        if not exact:
            for row, x_D in zip(logits, x_KD, strict=True):
                ids = best(row)
                row[ids] = self._head.rows(ids) @ x_D
        d = self.description
        logits = logits if d.logit_scale == 1.0 else logits.mul_(d.logit_scale)
        for row in logits if d.logit_cap else ():  # each as if alone, whatever its place
            row.copy_(capped(row, d.logit_cap))
        return logits

    def likely(self, x_KD: Tensor, count: int) -> Tensor:
        """(K, C) ids of the likeliest tokens after normed states, roughly: in the type of activations."""
        logits = self._project(x_KD.to(self.dtype), self.dtype)
        return logits.topk(min(count, logits.shape[1])).indices

    def _project(self, x_KD: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, V), block by block into one place."""
        size, at = self.description.vocab_size, 0
        out_KV = torch.empty(len(x_KD), size, dtype=dtype, device="cpu")
        for w in self._head.blocks():
            count = min(w.num_rows, size - at)
            out_KV[:, at : at + count] = w.encoding.linear(x_KD, w.fields, False)[:, :count]
            at += count
        return out_KV


def new_kv(d: Description, dtype: torch.dtype, room: int = 0) -> KV:
    """An empty cache of numbers for one sequence."""
    usual = d.num_kv_heads, d.head_dim
    others = {i: sizes for i, sizes in enumerate(d.kv_sizes) if sizes != usual}
    return KV(d.num_kv_layers, usual, dtype, room, states_of(d, dtype), others)


def rotary_angles(sizes: Mapping[Rope, int], positions: Sequence[int]) -> dict[Rope, Tensor]:
    """(T, 1, E/2) complex for each kind of rope, over heads of so many numbers: cosine and sine of each
    position's angles."""
    positions_T = torch.tensor(positions, dtype=torch.int64, device="cpu")
    return {rope: cos_sin(rope, head_dim, positions_T) for rope, head_dim in sizes.items()}
