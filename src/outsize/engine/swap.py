"""Keys and values put aside in a file, so that others have their memory; they come back bit by bit."""

from __future__ import annotations

import tempfile

from outsize.errors import DiskFullError
from outsize.home import home
from outsize.kv.kv import KV


class Swapped:
    """A cache's entries in a file without a name: it is gone when this process is. Raises DiskFullError."""

    def __init__(self, kv: KV) -> None:
        folder = home()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        try:
            kv.write(self._file)
            self._file.flush()
        except OSError as e:
            self._file.close()
            raise DiskFullError(
                f"{folder} cannot take keys and values of {kv.length:,} tokens put aside: {e.strerror}; "
                "make room there, or serve fewer --streams"
            ) from None

    def restore(self, kv: KV, room: int) -> None:
        """Into a cache with `room` for so many tokens; the file is let go. Raises ReadError."""
        self._file.seek(0)
        kv.read(self._file, room)
        self.close()

    def close(self) -> None:
        self._file.close()
