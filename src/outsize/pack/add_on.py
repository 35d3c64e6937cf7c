"""What reading the add-on files of packs has in common (neurons, nested experts, sums between ranks): tensors
in safetensors, and what a file says of itself in JSON. Hostile until proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from outsize.checkpoint.lora import Stored, raw
from outsize.checkpoint.typed_json import read_fields
from outsize.errors import AdapterError

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class AddOn:
    """A kind of them. `what`: that a file of another kind says nothing of; `command`, `example`: what makes
    one, without and with its flags."""

    kind: str
    version: int
    what: str
    command: str
    example: str

    def read(self, path: Path, form: type[T]) -> tuple[Stored, T]:
        """A file's tensors, and what it says, as `form`. Raises AdapterError for what is no such file."""
        tensors, said = raw(path)
        if said.get("kind") != self.kind:
            raise AdapterError(
                f"{path} says nothing of {self.what}; `{self.example}` makes such a file"
            )
        if said.get("version") != self.version:
            raise AdapterError(
                f"{path} was made by another outsize (version {str(said.get('version'))[:20]}, this is "
                f"{self.version}); make it again with `{self.command}`"
            )
        return tensors, self.parsed(path, said, form)

    def parsed(self, path: Path, said: Mapping[str, object], form: type[T]) -> T:
        """Raises AdapterError for fields that are missing, unknown or of another type."""
        try:
            return form(**read_fields(form, said, ""))
        except ValueError as e:
            raise self.damaged(path, str(e)) from None

    def damaged(self, path: Path, problem: str) -> AdapterError:
        return AdapterError(f"{path} is damaged: {problem}; make it again with `{self.command}`")


def printable(text: str) -> str:
    """What a file says, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shape_fault(due: Shapes, tensors: Stored) -> str:
    """Which tensor is not as it must be, in a clause; "" where all are, and there is no other."""
    found = tensors.shapes()
    wrong = next((n for n in {**due, **found} if due.get(n) != found.get(n)), None)
    if wrong is None:
        return ""
    return f"tensor {wrong[:60]!r} has shape {found.get(wrong)}, {due.get(wrong)} is due"
