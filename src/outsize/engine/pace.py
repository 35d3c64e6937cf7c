"""How many tokens of prompts a step may run, so that replies that are being written do not stand still.

Decoding replies get a token every step; a step with a slice of a prompt takes longer. So slices are sized by
what prompt tokens have taken so far. Reading hides computing: where a step waits for the disk anyway, a slice
that computes no longer costs nothing, and every further slice reads all that is not resident again.
"""

from __future__ import annotations

from dataclasses import dataclass

STALL_S = 0.3  # of a step with a slice, where replies wait for it
ALONE_S = 1.0  # where none does: a request that is dropped is computed no longer than this
LEARN = 0.3
FIRST = 512  # tokens, before any were seen


@dataclass(slots=True)
class Pace:
    """What steps take, in seconds."""

    token_s: float = 0.0  # a prompt's token, computed
    step_s: float = 0.0  # a step without one
    idle_s: float = 0.0  # of that, what it waits for the disk: computing hides in it
    read_s: float = 0.0  # a prompt's slice, read from disk: all that is not resident

    def saw(self, tokens: int, rows: int, seconds: float, waited: float = 0.0) -> None:
        """A step ran so many tokens of prompts, and rows of replies; of its time it waited for the disk."""
        if not tokens:
            rate = LEARN if self.step_s else 1.0
            self.step_s += rate * (seconds - self.step_s)
            self.idle_s += rate * (waited - self.idle_s)
            return
        other = self.step_s if rows and not waited else 0.0
        own = max(0.0, seconds - waited - other) / tokens
        # Later slices of a prompt attend to more: what a token takes is believed at once where it is more.
        rate = LEARN if 0 < own < self.token_s else 1.0
        self.token_s += rate * (own - self.token_s)

    def room(self, replies: int, chunk: int) -> int:
        """Tokens of prompts for the next step, a multiple of `chunk`."""
        if not self.token_s:
            return chunk if replies else max(chunk, FIRST)
        beside = max(STALL_S - self.step_s, self.idle_s)
        bar = beside if replies else max(ALONE_S, self.step_s, self.read_s)
        return max(1, int(bar / self.token_s) // chunk) * chunk
