"""The headers of a model on the hub, without its weights: sparse files of the right sizes, of which only
the beginnings are fetched, so that the usual readers read them."""

from __future__ import annotations

import fnmatch
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from outsize.checkpoint import gguf
from outsize.checkpoint.source import Spec, hub_error, hub_patterns
from outsize.errors import CheckpointError, UserError

FIRST, MOST = 4 << 20, 256 << 20  # bytes of a GGUF to try; doubled until its header is whole


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub."""

    repo: str
    name: str
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop. Raises whatever the network raises."""
        from huggingface_hub import hf_hub_url, utils

        url = hf_hub_url(self.repo, self.name)
        headers = utils.build_hf_headers()  # type: ignore[attr-defined]
        headers |= {"Range": f"bytes={start}-{stop - 1}"}
        session = utils.get_session()  # type: ignore[attr-defined]
        reply = session.get(url, headers=headers, timeout=60)
        reply.raise_for_status()
        content: bytes = reply.content
        whole = reply.status_code == 200  # a server that knows no ranges sends everything
        return content[start:stop] if whole else content


def fetch_headers(spec: Spec, folder: Path) -> Path:
    """A file or folder below `folder` for `open_checkpoint`. Raises FetchError, SourceError."""
    try:
        files = _wanted(spec)
        for file in files:
            _fetch(file, folder / file.name)
    except UserError:
        raise
    except Exception as e:  # the hub's own errors, and those of the HTTP library it happens to use
        raise hub_error(spec, e) from None
    single = [file.name for file in files if file.name.endswith(".gguf")]
    return folder / (spec.file or min(single, default=""))


def _wanted(spec: Spec) -> list[Remote]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(spec.name, files_metadata=True)
    files = [Remote(spec.name, s.rfilename, s.size or 0) for s in info.siblings or ()]
    patterns = hub_patterns(spec, [f.name for f in files])
    return [f for f in files if any(fnmatch.fnmatch(f.name, p) for p in patterns)]


def _fetch(file: Remote, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    if local.suffix == ".gguf":
        _fetch_gguf(file, local)
    elif local.suffix == ".safetensors":
        length = struct.unpack("<Q", file.read(0, 8))[0]
        local.write_bytes(file.read(0, 8 + min(length, MOST)))
        os.truncate(local, file.size)
    else:
        local.write_bytes(file.read(0, max(1, file.size)))


def _fetch_gguf(file: Remote, local: Path) -> None:
    """More and more of a file, until its header can be read."""
    local.touch()
    done, want = 0, FIRST
    while done < min(file.size, MOST):
        stop = min(want, file.size)
        with open(local, "r+b") as out:
            out.seek(done)
            out.write(file.read(done, stop))
            out.truncate(file.size)
        done, want = stop, 2 * want
        try:
            gguf.parse(local)
            return
        except CheckpointError:
            continue  # what is wrong with a whole header, `open_checkpoint` will say
