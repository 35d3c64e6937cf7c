"""What a run has measured, kept in a file as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from outsize.errors import OptionError


@dataclass
class Journal:
    """Losses by what was measured, kept in a file as soon as they are known."""

    path: Path
    about: dict[str, object]
    known: dict[str, list[float]] = field(default_factory=dict)

    def resume(self) -> None:
        """Raises OptionError for what another run kept."""
        said: object = None
        with suppress(OSError, ValueError):
            said = json.loads(self.path.read_text())
        if not isinstance(said, dict) or said.get("about") != self.about:
            raise OptionError(
                f"{self.path} is of another run; give the flags and files it was started with, or remove it "
                "to begin anew"
            )
        self.known = {str(k): list(map(float, v)) for k, v in said["known"].items()}

    def get(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        if name not in self.known:
            self.known[name] = measure()
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps({"about": self.about, "known": self.known}))
            part.replace(self.path)
        return self.known[name]
