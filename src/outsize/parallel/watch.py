"""Whether the other ranks live: a thread that sends and hears a sign of life every few seconds.

It has a connection of its own to each rank, so that a rank that computes for a minute is not taken for a lost
one. A process that ends closes it, which is seen at once; a machine that is switched off, a cable that is
pulled or a process that is stopped is seen by silence. Who is lost first is told to all that wait.
"""

from __future__ import annotations

import contextlib
import json
import select
import threading
import time
from collections.abc import Callable, Mapping

from outsize.errors import PeerError
from outsize.parallel.frames import Channel, Kind
from outsize.parallel.transport import LOOK_S, SILENCE_S

BEAT_S = 2.0
WHY = 500  # characters of the reason a rank gives for ending
STOPPED_S = 3.0  # so long this thread does not wait: who does was stopped, or its machine slept
SETTLED_S = 1.0  # so long after a connection broke the reason may still come


class Watch:
    """Of one rank over all others. Starts at once; `close` ends it."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self._channels = dict(channels)
        now = time.monotonic()
        self._heard, self._beat_at = dict.fromkeys(channels, now), now
        self._looked_at = now
        self._lost: PeerError | None = None
        self._known, self._ended = threading.Event(), threading.Event()
        self.on_loss: list[
            Callable[[int], None]
        ] = []  # called once, with the lost rank, in the thread
        self._thread = threading.Thread(target=self._run, name="outsize-watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the PeerError that names the rank that was lost first, if one was."""
        if self._lost is not None:
            raise PeerError(str(self._lost), self._lost.rank)

    def broken(self, channel: Channel | None, what: str) -> PeerError:
        """The error for a connection that broke: what the watch knows of who ended and why, or `what`."""
        self._known.wait(SETTLED_S)
        if (lost := self._lost) is not None:
            return PeerError(str(lost), lost.rank)
        return PeerError(f"another rank {what}") if channel is None else channel.error(what)

    def _run(self) -> None:
        poller = select.poll()
        by_number = {c.sock.fileno(): r for r, c in self._channels.items()}
        for number in by_number:
            poller.register(number, select.POLLIN)
        while self._channels and not self._ended.is_set():
            for number, _ in poller.poll(LOOK_S * 1000):
                if not self._hear(by_number[number]):
                    poller.unregister(number)
            self._beat(time.monotonic())
            if (
                not threading.main_thread().is_alive()
            ):  # and has not closed: what still waits must end
                self._lose(PeerError("this process is ending"), next(iter(self._channels)))

    def _hear(self, rank: int) -> bool:
        """Is there more to hear of this rank?"""
        try:
            kind, payload = self._channels[rank].hear()
            if kind is Kind.BEAT:
                self._heard[rank] = time.monotonic()
                return True
            self._lose(_reason(self._channels[rank], payload), rank)
        except PeerError as error:
            self._lose(error, rank)
        return False

    def _beat(self, now: float) -> None:
        stood_still = now - self._looked_at - LOOK_S
        self._looked_at = now
        if stood_still > STOPPED_S:  # this process was stopped: it could not have heard of others
            self._heard = {rank: at + stood_still for rank, at in self._heard.items()}
        for rank, at in list(self._heard.items()):
            if now - at > SILENCE_S - LOOK_S - BEAT_S / 2:
                what = f"gave no sign of life for {now - at:.0f} s"
                self._lose(self._channels[rank].error(what), rank)
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            for rank in list(self._heard):
                try:
                    self._channels[rank].say(Kind.BEAT)
                except PeerError as error:
                    self._lose(error, rank)

    def _lose(self, error: PeerError, rank: int) -> None:
        self._heard.pop(rank, None)
        if self._lost is None and not self._ended.is_set():
            self._lost = error
            self._known.set()
            for call in self.on_loss:
                call(rank)

    def close(self, why: BaseException | None = None) -> None:
        """Tell the others that this rank ends, and why."""
        if self._ended.is_set():
            return
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        rank = why.rank if isinstance(why, PeerError) else None
        told = json.dumps({"rank": rank, "why": "" if why is None else str(why)[:WHY]}).encode()
        for channel in self._channels.values():
            with contextlib.suppress(PeerError):
                channel.say(Kind.BYE, told)
            channel.close()


def _reason(channel: Channel, payload: bytes) -> PeerError:
    """What a rank said when it ended. If it did because it lost another, that one is lost."""
    try:
        told = json.loads(payload)
        rank, why = told["rank"], str(told["why"])[:WHY]
    except (ValueError, KeyError, TypeError):
        return channel.error("sent a farewell that is none")
    if isinstance(rank, int):
        return PeerError(why, rank)
    return channel.error(f"ended: {why}" if why else "has left")
