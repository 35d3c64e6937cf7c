"""Who may be a rank: those who know a secret, shown before anything else that they send is read.

Both sides send 8 bytes that name the protocol and 32 random ones; then who connected shows HMAC-SHA256 of
both random numbers under the secret, and only then the other does the same. The secret itself never travels.
Each connection's frames are tagged with keys made of the secret and both numbers. Nothing is encrypted:
whoever sees the link sees the activations. Without a secret ranks meet on this machine alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket

from outsize.errors import OptionError, PeerError
from outsize.parallel.frames import Channel

MAGIC = b"outsize\x01"
RANDOM, SHOWN = 32, 32
LEAST = 16  # characters: who listens may try guesses offline
GREETING_S = 5.0
NAME = "OUTSIZE_SECRET"


def secret() -> bytes | None:
    """The secret of the environment; empty counts as none."""
    told = os.environ.get(NAME) or None
    if told is not None and len(told) < LEAST:
        raise OptionError(
            f"{NAME} has {len(told)} characters and needs {LEAST}: `openssl rand -hex 16` makes one"
        )
    return None if told is None else told.encode()


def check_address(host: str, key: bytes | None) -> None:
    """Refuse to meet others than this machine's processes without a secret."""
    if key is not None:
        return
    try:
        found = {str(a[4][0]).split("%")[0] for a in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise OptionError(f"{host} is no address ({error.strerror})") from None
    if not all(ipaddress.ip_address(a).is_loopback for a in found):
        raise OptionError(
            f"{host} is not this machine itself, and ranks elsewhere must share a secret: set {NAME} to the "
            "same for all of them (`openssl rand -hex 16` makes one)"
        )


def greet(sock: socket.socket, connected: bool, key: bytes | None) -> Channel:
    """A channel to a peer that knows the secret. `connected`: did this side connect? Raises PeerError. The
    socket's timeout is GREETING_S then."""
    sock.settimeout(GREETING_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bare = Channel(sock, "{}:{}".format(*sock.getpeername()[:2]), None)
    ours = secrets.token_bytes(RANDOM)
    _send(bare, MAGIC + ours)
    if (magic := bare.read(len(MAGIC)))[:-1] != MAGIC[:-1]:
        raise bare.error("is no rank of outsize")
    if magic != MAGIC:
        raise bare.error(f"speaks protocol {magic[-1]} and this version protocol {MAGIC[-1]}")
    theirs = bare.read(RANDOM)
    both = ours + theirs if connected else theirs + ours
    mine, other = (b"connects", b"listens") if connected else (b"listens", b"connects")
    if connected:
        _send(bare, _shown(key, mine, both))
    if not hmac.compare_digest(_read_shown(bare, key), _shown(key, other, both)):
        raise PeerError(_wrong(bare, key))
    if not connected:
        _send(bare, _shown(key, mine, both))
    if key is None:
        return bare
    return Channel(
        sock,
        bare.who,
        (_shown(key, b"frames of " + mine, both), _shown(key, b"frames of " + other, both)),
    )


def _wrong(peer: Channel, key: bytes | None) -> str:
    have = "none is set here" if key is None else "it is not the one set here"
    return (
        f"{peer.who} does not share this rank's secret ({NAME}: {have}): set the same for all ranks"
    )


def _read_shown(peer: Channel, key: bytes | None) -> bytes:
    try:
        return peer.read(SHOWN)
    except PeerError as error:
        if "hung up" in str(error):  # who listens ends the connection after a wrong proof
            raise PeerError(_wrong(peer, key)) from None
        raise


def _shown(key: bytes | None, what: bytes, both: bytes) -> bytes:
    return hmac.digest(key or b"", what + both, "sha256")


def _send(peer: Channel, what: bytes) -> None:
    try:
        peer.sock.sendall(what)
    except OSError as error:
        raise peer.error(f"hung up ({error.strerror or error})") from None
