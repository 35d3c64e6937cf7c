"""What a load test is told."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass

from outsize.arguments import real, whole
from outsize.errors import OptionError
from outsize.options import LoadOptions, check_names

QUICK = "one,many,long,idle,prefix"
RANGES = {
    "requests": (0, 1 << 20), "prompt_tokens": (1, 1 << 20), "new_tokens": (2, 1 << 20),
    "long_tokens": (1, 1 << 20), "repeats": (1, 1 << 20), "seed": (0, 1 << 60),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to measure, and on what server."""

    loads: str = QUICK
    url: str = ""  # of a server that runs; empty: `outsize serve` is started
    api_key: str = ""
    streams: str = "8"  # clients at once; several numbers are measured in turn
    requests: int = 0  # 0: as many as the load is made for
    prompt_tokens: int = 60
    new_tokens: int = 96
    long_tokens: int = 4000  # of a prompt that joins, and of the whole soak's longest
    seconds: float = 60.0  # of a soak
    limit: float = 600.0  # seconds of each load, at most
    repeats: int = 1  # of all loads, in turn
    seed: int = 0  # of prompts and arrivals
    chat: bool = False  # through the chat template
    ignore_eos: bool = True  # replies of exactly `new_tokens`
    in_process: bool = False  # beside `Model.stream` and `Model.generate`, in turn
    serve: str = ""  # more flags for the server
    wrap: str = ""  # a command that runs the server, as one that caps memory

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            whole(name, getattr(self, name), low, high)
        for name in ("seconds", "limit"):
            real(name, getattr(self, name), 0.1, 1e6)
        if self.url and (self.serve or self.wrap or self.in_process):
            raise OptionError(
                "url names a server that runs; serve, wrap and in_process are for one that is started here: "
                "leave them out, or url"
            )
        self.stream_counts()

    def stream_counts(self) -> list[int]:
        """Raises OptionError."""
        try:
            counts = [int(n) for n in self.streams.split(",")]
        except ValueError:
            counts = []
        if not counts or not all(1 <= n <= 1024 for n in counts):
            raise OptionError(
                f"streams is {self.streams!r}; numbers from 1 to 1,024 like 1,4,16 are expected"
            )
        return counts

    def load_names(self, known: Collection[str]) -> list[str]:
        """Raises OptionError for one that is not known."""
        names = [n.strip() for n in self.loads.split(",") if n.strip()]
        names = list(known) if names == ["all"] else names
        check_names(names, list(known))
        return names

    def server_flags(self, load: LoadOptions) -> list[str]:
        """Of `outsize serve`: how the model is opened, room for the streams, and what else was said."""
        chosen = {
            "memory": load.memory, "context": load.context, "threads": load.threads, "draft": load.draft,
            "streams": max(self.stream_counts()),
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        return [*flags, *shlex.split(self.serve)]
