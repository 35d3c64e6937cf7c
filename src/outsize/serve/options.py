"""What a server may be told: where it listens, who may ask, how it ends. Field names are the flags' names."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from outsize.arguments import real, whole
from outsize.errors import OptionError

MAX_BODY = 8 << 20  # bytes of a request
MAX_BODIES = 64 << 20  # of all requests that are being answered


def is_loopback(host: str) -> bool:
    """Does this address mean this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve a model."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    api_key: str | None = None
    alias: tuple[str, ...] = ()  # further names of the model; "*": any name
    max_queue: int = 64  # requests that wait; more are refused
    idle_unload: float | None = None  # minutes without a request, after which the model is closed
    cors: tuple[str, ...] = ()  # origins of web pages that may ask
    lenient: bool = False  # fields that are not known are reported in a header, not refused
    grace: float = 30.0  # seconds that replies have to end in when the server is told to
    json_log: bool = False
    silence_s: float = 1.0  # after which a stream sends a sign of life

    def __post_init__(self) -> None:
        whole("port", self.port, 0, 65535)
        whole("max_queue", self.max_queue, 0, 1 << 16)
        real("grace", self.grace, 0, 86400)
        if self.idle_unload is not None:
            real("idle_unload", self.idle_unload, 0, 1e6)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise OptionError("the API key is empty, or not ASCII; give one of letters and digits")
        if not is_loopback(self.host) and self.api_key is None:
            raise OptionError(
                f"--host {self.host} lets other machines ask; give a key that they must know: --api-key, "
                "or OUTSIZE_API_KEY in the environment"
            )
