"""Models of the Hugging Face hub: which files are a model's, fetching them whole, or their headers alone, and
finding them in the hub's cache where there is no network.

Headers are fetched into sparse files of the right sizes, so that the usual readers read them.
"""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outsize.checkpoint import gguf, safetensors
from outsize.checkpoint.choose import Choice, Place, choose
from outsize.checkpoint.opening import chosen_in, local_place
from outsize.checkpoint.read_json import MAX_JSON, parse_json, read_json
from outsize.checkpoint.spec import Spec, is_inside
from outsize.errors import CheckpointError, FetchError, OutsizeError, UserError
from outsize.progress import is_watched

HINT = "add one's name, folder or quantization after a colon"
DEPTH = 8  # levels of folders in a repository
FIRST, MOST = 4 << 20, 128 << 20  # bytes of a GGUF to try; doubled until its header is whole
Read = Callable[[str], Mapping[str, object]]


def is_offline() -> bool:
    """Has the user forbidden the network (HF_HUB_OFFLINE)?"""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_choice(spec: Spec, names: Sequence[str], read: Read) -> Choice:
    """The model's files among those of its repository. Raises UserError."""
    return choose(Place(f"hf:{spec.name}", tuple(names), read, HINT), spec.file)


def hub_patterns(spec: Spec, names: Sequence[str]) -> list[str]:
    """What to fetch, as patterns that match these files literally. Raises UserError."""
    return [glob.escape(name) for name in hub_choice(spec, names, _reader(spec)).files]


def _reader(spec: Spec) -> Read:
    from huggingface_hub import hf_hub_download

    return lambda name: read_json(Path(hf_hub_download(spec.name, name)))


def fetch_hub(spec: Spec, quiet: bool) -> Path:
    """The path of a model in the hub's cache, fetched if it is not there. Raises FetchError, UserError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not is_watched():
        disable_progress_bars()
    try:
        names = HfApi().list_repo_files(spec.name)
        folder = Path(snapshot_download(spec.name, allow_patterns=hub_patterns(spec, names)))
    except OutsizeError:
        raise
    except Exception as e:  # the hub's own errors, and those of the HTTP library it happens to use
        return from_cache(spec, e)
    return folder / hub_choice(spec, names, lambda name: read_json(folder / name)).at


def from_cache(spec: Spec, error: Exception) -> Path:
    """The path of a model in the hub's cache, after `error` came of asking the hub. Raises FetchError with
    what it says, if the hub answered (no such repository, no access) or nothing is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        raise hub_error(spec, error) from None
    try:  # no pattern: a snapshot of some of a repository's files is as good as a whole one
        folder = Path(snapshot_download(spec.name, allow_patterns=[], local_files_only=True))
    except (OSError, ValueError):
        raise hub_error(spec, error) from None
    place = local_place(
        folder, f"hf:{spec.name}, of which only the hub's cache can be read,", HINT, DEPTH
    )
    return folder / chosen_in(folder, place, spec.file).at


def hub_error(spec: Spec, error: Exception) -> FetchError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return FetchError(
        f"cannot fetch {spec.text}: {said[0][:200]}; check the name and the network, set HF_TOKEN for "
        "a gated model, or give a path"
    )


# --- headers alone -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub."""

    repo: str
    name: str
    size: int
    commit: str = ""  # of the repository; the newest if empty

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop. Raises whatever the network raises."""
        from huggingface_hub import hf_hub_url, utils

        url = hf_hub_url(self.repo, self.name, revision=self.commit or None)
        headers = utils.build_hf_headers()  # type: ignore[attr-defined]
        headers |= {"Range": f"bytes={start}-{stop - 1}"}
        session = utils.get_session()  # type: ignore[attr-defined]
        reply = session.get(url, headers=headers, timeout=60)
        reply.raise_for_status()
        content: bytes = reply.content
        whole = reply.status_code == 200  # a server that knows no ranges sends everything
        return content[start:stop] if whole else content[: stop - start]


def fetch_headers(spec: Spec, folder: Path) -> Path:
    """A file or folder below `folder` for `open_checkpoint`: what `fetch` would bring, without its weights;
    the one in the hub's cache where there is no network. Raises FetchError, UserError."""
    try:
        files = _wanted(spec)
        for file in files:
            _fetch(file, local_name(folder, file.name))
    except UserError:
        raise
    except Exception as e:  # the hub's own errors, and those of the HTTP library it happens to use
        return from_cache(spec, e)
    place = local_place(folder, f"hf:{spec.name}", HINT, DEPTH)
    return folder / choose(place, spec.file).at


def local_name(folder: Path, name: str) -> Path:
    """Where a repository's file belongs. Raises CheckpointError for a name that leads out of the folder."""
    if not is_inside(name):
        raise CheckpointError(
            f"{name!r}: this name of a file leads out of its repository; do not use it"
        )
    return folder / name


def _wanted(spec: Spec) -> list[Remote]:
    """The files of the model. Raises UserError, before any is fetched, where they are in doubt."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(spec.name, files_metadata=True)
    files = {
        s.rfilename: Remote(spec.name, s.rfilename, s.size or 0, info.sha or "")
        for s in info.siblings or ()
    }
    choice = hub_choice(spec, list(files), lambda name: _json(files[name]))
    return [files[name] for name in choice.files]


def _json(file: Remote) -> dict[str, object]:
    if file.size > MAX_JSON:
        raise _too_long(file)
    return parse_json(Path(file.name), file.read(0, max(1, file.size)))


def _too_long(file: Remote) -> CheckpointError:
    return CheckpointError(
        f"{file.name}: {file.size:,} bytes beside the weights, at most {MAX_JSON:,} are read"
    )


def _fetch(file: Remote, local: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    local.parent.mkdir(parents=True, exist_ok=True)
    cached = try_to_load_from_cache(file.repo, file.name, revision=file.commit or None)
    if isinstance(cached, str):  # it was fetched before
        local.symlink_to(cached)
    elif local.suffix == ".gguf":
        _fetch_gguf(file, local)
    elif local.suffix == ".safetensors":
        length = struct.unpack("<Q", file.read(0, 8).ljust(8, b"\0"))[0]
        local.write_bytes(file.read(0, 8 + min(length, safetensors.MAX_HEADER)))
        os.truncate(local, file.size)
    elif file.size > MAX_JSON:
        raise _too_long(file)
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
