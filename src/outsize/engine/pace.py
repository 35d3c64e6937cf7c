"""How many tokens of prompts a step may run, so that replies that are being written do not stand still.

Decoding replies get a token every step; a step with a slice of a prompt takes longer. So slices are sized by
what prompt tokens have taken so far. Reading hides computing: where a step waits for the disk anyway, a slice
that computes no longer costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

STALL_S = 0.3  # of a slice, where replies wait for it
ALONE_S = 1.0  # where none does: a request that is dropped is computed no longer than this
LEARN = 0.3
FIRST = 512  # tokens, before any were seen


@dataclass(slots=True)
class Pace:
    """Seconds a prompt's token takes, and what a step takes that has none."""

    token_s: float = 0.0
    step_s: float = 0.0

    def saw(self, tokens: int, rows: int, seconds: float) -> None:
        """A step ran so many tokens of prompts, and rows of replies."""
        if not tokens:
            self.step_s += (LEARN if self.step_s else 1.0) * (seconds - self.step_s)
            return
        own = max(0.0, seconds - (self.step_s if rows else 0.0)) / tokens
        self.token_s += (LEARN if self.token_s else 1.0) * (own - self.token_s)

    def room(self, replies: int, chunk: int) -> int:
        """Tokens of prompts for the next step, a multiple of `chunk`."""
        if not self.token_s:
            return max(chunk, FIRST if not replies else chunk)
        seconds = max(STALL_S if replies else ALONE_S, self.step_s)
        return max(1, int(seconds / self.token_s) // chunk) * chunk
