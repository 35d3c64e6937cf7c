"""Models of the Hugging Face hub: which files are a model's, fetching them, and finding them in the hub's
cache where there is no network."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from outsize.checkpoint.choose import Choice, Place, choose
from outsize.checkpoint.opening import chosen_in, local_place
from outsize.checkpoint.read_json import read_json
from outsize.checkpoint.spec import Spec
from outsize.errors import FetchError, OutsizeError
from outsize.progress import is_watched

HINT = "add one's name, folder or quantization after a colon"
DEPTH = 8  # levels of folders in a repository
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
