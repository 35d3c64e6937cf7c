"""What drafts have cost a reply, less what they have brought it: the bound on what a bad guesser can lose."""

from __future__ import annotations

SHARE = 0.03  # of a reply's time, that drafts may have lost
GRACE = 1.0  # steps without drafts, that they may have lost beside: something has to be tried


class Loss:
    """One reply's account, in seconds."""

    def __init__(self) -> None:
        self.lost = self.elapsed = 0.0

    def step(self, took: float, plain: float, worth: float) -> None:
        """A step took so long; one without a draft would have taken `plain`, and the tokens that guesses
        brought would have taken `worth`."""
        self.elapsed += took
        self.lost += took - plain - worth

    def allows(self, plain: float) -> bool:
        """May drafts go on, where a step without them takes `plain` seconds?"""
        return self.lost <= SHARE * self.elapsed + GRACE * plain
