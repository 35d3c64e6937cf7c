"""A connection to one peer that has shown who it is: frames with a number and, where ranks share a secret, a
tag that only who knows it can make.

A frame is 16 bytes (kind, length, sequence number), the payload, and 16 bytes of BLAKE2b keyed for this
connection and direction; without a secret there is no tag. What comes is read only as far as it may be long;
anything else ends the connection. Frames are not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from enum import IntEnum

from outsize.errors import PeerError
from outsize.parallel.transport import Buffer

HEAD = struct.Struct("<IIQ")  # kind, bytes of payload, sequence number
TAG = 16
MOST = 8192  # bytes of payload in a frame whose length is not known beforehand


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    BEAT = 4
    BYE = 5
    ADDRESS = 6
    DATA = 7


class Channel:
    """One connection; `who` names the peer in messages, `rank` is its rank once known."""

    def __init__(self, sock: socket.socket, who: str, keys: tuple[bytes, bytes] | None) -> None:
        """`keys`: of what goes out and of what comes; none without a secret."""
        self.sock, self.who = sock, who
        self.rank: int | None = None
        self.keys = keys
        self.tag = 0 if keys is None else TAG
        self.sent = self.came = 0  # frames: their sequence numbers

    @property
    def overhead(self) -> int:
        """Bytes of a frame besides its payload."""
        return HEAD.size + self.tag

    @property
    def host(self) -> str:
        """The peer's address."""
        return str(self.sock.getpeername()[0])

    def named(self, rank: int) -> None:
        self.rank, self.who = rank, f"rank {rank} ({self.host})"

    def frame(self, kind: Kind, payload: Buffer) -> list[memoryview]:
        """What to send, in pieces; the payload is not copied."""
        head = HEAD.pack(kind, len(payload), self.sent)
        self.sent += 1
        pieces = [memoryview(head), memoryview(payload)]
        if self.keys is not None:
            pieces.append(memoryview(_tag(self.keys[0], head, payload)))
        return [p for p in pieces if len(p)]

    def check_head(self, head: Buffer, kind: Kind, length: int) -> None:
        """That a frame is the one that is to come."""
        wanted = (kind, length, self.came)
        if (got := HEAD.unpack(head)) != wanted:
            raise self.error(
                f"sent a message (kind {got[0]}, {got[1]} bytes, number {got[2]}) where another (kind "
                f"{int(kind)}, {length} bytes, number {self.came}) was to come"
            )

    def check_tag(self, head: Buffer, payload: Buffer, tag: Buffer) -> None:
        """After all of a frame has come."""
        self.came += 1
        if self.keys is not None and not hmac.compare_digest(
            _tag(self.keys[1], head, payload), tag
        ):
            raise self.error("sent a message that was changed on its way, or is of someone else")

    def error(self, what: str) -> PeerError:
        return PeerError(f"{self.who} {what}", self.rank)

    def say(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a whole short frame; the socket's timeout holds."""
        try:
            self.sock.sendall(b"".join(self.frame(kind, payload)))
        except OSError as error:
            raise self.error(f"hung up ({error.strerror or error})") from None

    def hear(self) -> tuple[Kind, bytes]:
        """The next short frame, whatever its kind; the socket's timeout holds."""
        head = self.read(HEAD.size)
        kind, length, number = HEAD.unpack(head)
        if length > MOST:
            raise self.error(f"sent a message of {length} bytes where at most {MOST} may come")
        if number != self.came or kind not in set(Kind):
            raise self.error(
                f"sent a message of kind {kind}, number {number}, where number {self.came} was to come"
            )
        payload, tag = self.read(length), self.read(self.tag)
        self.check_tag(head, payload, tag)
        return Kind(kind), payload

    def read(self, count: int) -> bytes:
        """Exactly so many bytes."""
        got = bytearray()
        while len(got) < count:
            try:
                some = self.sock.recv(count - len(got))
            except TimeoutError:
                raise self.error(f"sent nothing for {self.sock.gettimeout():g} s") from None
            except OSError as error:
                raise self.error(f"hung up ({error.strerror or error})") from None
            if not some:
                raise self.error("hung up" + (" in the middle of a message" if got else ""))
            got += some
        return bytes(got)

    def close(self) -> None:
        self.sock.close()


def _tag(key: bytes, head: Buffer, payload: Buffer) -> bytes:
    made = hashlib.blake2b(head, digest_size=TAG, key=key)
    made.update(payload)
    return made.digest()
