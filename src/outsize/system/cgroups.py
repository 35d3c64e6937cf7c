"""Control groups, version 1 and 2: the limits that a container sets, also on the groups around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60


def groups(controller: str, told: Path | None = None) -> Iterator[tuple[Path, int]]:
    """A process's groups of a controller, innermost first, each with its version; `told` is the file in which
    its groups stand (this process's: OWN)."""
    try:
        lines = (told or OWN).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        root = next((ROOT / n for n in (controller, kinds) if kinds and (ROOT / n).is_dir()), ROOT)
        here = root if ".." in path.split("/") else root / path.lstrip("/")
        while here != root.parent:
            yield here, 1 if kinds else 2
            here = here.parent


def number(path: Path) -> int | None:
    """The number in a file; None if there is none."""
    try:
        text = path.read_text().strip()
        return UNLIMITED if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def quota() -> float | None:
    """Processor cores that the tightest group allows, as a share of time; None where there is no quota."""
    found = [q for group, version in groups("cpu") if (q := _quota(group, version)) is not None]
    return min(found, default=None)


def _quota(group: Path, version: int) -> float | None:
    if version == 1:
        most, period = number(group / "cpu.cfs_quota_us"), number(group / "cpu.cfs_period_us")
    else:
        try:
            words = (group / "cpu.max").read_text().split()
            most, period = (None if words[0] == "max" else int(words[0])), int(words[1])
        except (OSError, ValueError, IndexError):
            return None
    return most / period if most is not None and period and most > 0 else None
