"""The training task of feed-forwards of the embedding: next tokens of a text, from nothing (arXiv 2602.00398,
section 4: Adam, cosine, cross-entropy and a z-loss)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt.loop import Recipe
from outsize.adapt.memory.network import EMBED, Shape, flex, forward, new_parameters
from outsize.arguments import whole
from outsize.errors import OptionError

KIND = "memory"
Z_LOSS = 1e-6
HELD_OUT = 64  # sequences, at most
# Layers, width, heads, vocabulary.
CONFIGS = {"mini": (4, 128, 4, 2048), "tiny": (6, 256, 4, 4096), "small": (8, 512, 8, 8192)}
MOST_FLEX = 3


@dataclass(frozen=True, slots=True)
class MemoryRecipe(Recipe):
    """How to train. `flex`: so many width^2 numbers of each feed-forward read the residual stream."""

    batch: int = 8
    rate: float = 2e-3
    length: int = 256
    config: str = "tiny"
    flex: int = 0
    decay: float = 0.1  # of weights
    # To compare with: the plain llama of as many numbers (or of `inner`), and one norm for all layers.
    base: bool = False
    inner: int = 0
    shared_norm: bool = False

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        if self.config not in CONFIGS:
            raise OptionError(f"config is {self.config!r}; known are {', '.join(CONFIGS)}")
        whole("flex", self.flex, 0, MOST_FLEX)
        if self.length < 2:
            raise OptionError("length is 1: a token's next one is not there; give 2 or more")

    @property
    def weight_decay(self) -> float:
        return self.decay

    def shape(self) -> Shape:
        """Of the network."""
        layers, width, heads, vocab = CONFIGS[self.config]
        made = flex(layers, width, heads, vocab, self.flex)
        if not self.base:
            return Shape(
                layers, width, heads, vocab, made.inner, made.dense, shared_norm=self.shared_norm
            )
        inner = self.inner or flex(layers, width, heads, vocab, 0).inner
        return Shape(layers, width, heads, vocab, max(0, inner), is_base=True)


@dataclass(slots=True)
class MemoryTask:
    """A `Task` of the training loop. `train` and `held_out`: tokens of a text, in order."""

    recipe: MemoryRecipe
    train: Tensor
    held_out: Tensor
    device: torch.device
    kind: torch.dtype  # of products
    use: str = "run "
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        made = new_parameters(self.recipe.shape(), self.recipe.seed)
        self.parameters = {k: v.to(self.device).requires_grad_() for k, v in made.items()}

    def kept(self) -> dict[str, Tensor]:
        return {}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Nothing but parameters goes on."""

    def loss(self, step: int, part: slice) -> Tensor:
        length = self.recipe.length
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + step)
        last = len(self.train) - length
        starts = torch.randint(0, last, (self.recipe.batch,), generator=generator)[part]
        rows = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()])
        return self._loss(rows.to(self.device), Z_LOSS)

    def _loss(self, ids_BS: Tensor, z: float) -> Tensor:
        """Mean over all tokens of (B, S + 1) that have one before."""
        is_low = self.kind != torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_low):
            x_BSD = forward(self.parameters, self.recipe.shape(), ids_BS[:, :-1])
            logits = linear(x_BSD, self.parameters[EMBED]).float().flatten(0, 1)
        total = logits.logsumexp(-1)
        right = logits.gather(1, ids_BS[:, 1:].reshape(-1, 1))[:, 0]
        return (total - right).mean() + z * (total**2).mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats a token on text that is not trained on: of sequences from all of it, evenly."""
        length = self.recipe.length
        rows = self.held_out.unfold(0, length + 1, length + 1)
        rows = rows[:: -(-len(rows) // HELD_OUT)]
        losses = [self._loss(some.to(self.device), 0.0) for some in rows.split(8)]
        counts = [len(some) for some in rows.split(8)]
        found = sum(float(loss) * n for loss, n in zip(losses, counts, strict=True))
        return {"held_out_loss": round(found / len(rows), 5)}

    def about(self) -> dict[str, object]:
        return {"kind": KIND, "version": 1}
