"""No guesses: plain decoding is speculation with an empty draft. This file also holds the protocol."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.draft.drafter import Draft
from outsize.forward.span import Out


class NoDraft:
    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        return Draft()

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """Nothing to learn."""

    def close(self) -> None:
        """Nothing to end."""
