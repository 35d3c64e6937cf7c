"""What every request body is: JSON of known fields. Each field is honoured, or accepted at its neutral value
alone, or said to be without effect; none is ignored in silence.

null means absent. A field that is not known is an error that names it, or, with --lenient, is reported in a
header.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """The base of all request bodies and their parts: unknown fields are kept apart (`model_extra`), so that
    they are refused by name or, with --lenient, reported."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
