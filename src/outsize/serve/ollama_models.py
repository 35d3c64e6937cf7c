"""Models as Ollama describes them: lists, what is loaded, and what one is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from outsize.engine.model import Model
from outsize.pack.format import HEADER, Pack
from outsize.serve.host import Host

Frame = dict[str, object]
LATEST = ":latest"  # that Ollama's clients add to a name without a tag
FOR_EVER = timedelta(days=365 * 100)  # until when a model stays that is not closed by itself
THINKING = ("enable_thinking", "reasoning_effort", "<think>")  # of templates of models that think


@dataclass(frozen=True, slots=True)
class Card:
    """What there is to say of a model; before it was first opened, little."""

    size: int = 0
    digest: str = ""
    modified: str = ""
    family: str = ""
    parameters: int = 0
    encoding: str = ""
    context: int = 0  # tokens that the server has room for
    longest: int = 0  # that the model was made for
    template: str = ""
    licence: str = ""
    numbers: Mapping[str, int] | None = None

    @property
    def details(self) -> Frame:
        return {
            "parent_model": "", "format": "outsize", "family": self.family,
            "families": [self.family] if self.family else [],
            "parameter_size": shown_count(self.parameters) if self.parameters else "",
            "quantization_level": self.encoding,
        }  # fmt: skip

    @property
    def capabilities(self) -> list[str]:
        more = {
            "tools": bool(self.template),  # described in words where the template has none for them
            "thinking": any(name in self.template for name in THINKING),
        }
        return ["completion", *(name for name, has in more.items() if has)]


def card_of(model: Model) -> Card:
    pack, described = model.pack, model.pack.description
    numbers = {
        "context_length": described.context, "embedding_length": described.width,
        "block_count": described.num_layers, "feed_forward_length": described.ffn_width,
        "attention.head_count": described.num_heads, "attention.head_count_kv": described.num_kv_heads,
        "attention.key_length": described.head_dim, "vocab_size": described.vocab_size,
    }  # fmt: skip
    if described.mixture is not None:
        numbers["expert_count"] = described.mixture.count
        numbers["expert_used_count"] = described.mixture.used
    return Card(
        size=pack.size,
        digest=pack.source.identity or pack.source.sha256,
        modified=_changed(pack.path / HEADER),
        family=described.family,
        parameters=parameters(pack),
        encoding=max(pack.encodings, key=lambda e: pack.share_of([e])).upper(),
        context=model.context,
        longest=described.context,
        template=_template(pack),
        licence=pack.licence or "",
        numbers=numbers,
    )


def _template(pack: Pack) -> str:
    known = pack.chat_templates
    return known.get("default") or next(iter(known.values()), "")


def _changed(path: Path) -> str:
    return written(datetime.fromtimestamp(path.stat().st_mtime, UTC))


def written(time: datetime) -> str:
    """A time as Ollama writes it."""
    return time.isoformat().replace("+00:00", "Z")


def parameters(pack: Pack) -> int:
    """How many weights a pack's matrices have."""
    total = 0
    for table in pack.tables:
        matrices = [m for tensor in table.tensors.values() for m in tensor]
        if table.num_rows:
            total += sum(table.num_rows * width for width in {m.width for m in matrices})
        else:
            total += sum(m.num_rows * m.width for m in matrices) * len(table.keys)
    return total


def shown_count(count: int) -> str:
    """134,515,008 as "134.5M"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


class Models:
    """A host's model, as Ollama lists it under each of its names."""

    def __init__(self, host: Host) -> None:
        self._host, self._last = host, Card()

    def card(self) -> Card:
        """Of the model that is open, or was last."""
        running = self._host.running
        if running is not None and not self._last.digest:
            self._last = card_of(running.model)
        return replace(self._last, context=self._host.context or self._last.context)

    def tags(self) -> Frame:
        card = self.card()
        modified = card.modified or written(datetime.fromtimestamp(self._host.created, UTC))
        common = {
            "modified_at": modified,
            "size": card.size,
            "digest": card.digest,
            "details": card.details,
        }
        return {"models": [{**_named(name), **common} for name in self._host.names()]}

    def loaded(self) -> Frame:
        """/api/ps: the model, if it is open."""
        if self._host.running is None:
            return {"models": []}
        card, idle = self.card(), self._host.options.idle_unload
        ends = datetime.now(UTC) + (FOR_EVER if idle is None else timedelta(minutes=idle))
        common = {
            "size": card.size, "digest": card.digest, "details": card.details, "expires_at": written(ends),
            "size_vram": 0, "context_length": card.context,
        }  # fmt: skip
        return {"models": [{**_named(self._host.name), **common}]}

    def shown(self) -> Frame:
        card = self.card()
        prefix = card.family or "model"
        info: Frame = {
            "general.architecture": card.family,
            "general.parameter_count": card.parameters,
        }
        info |= {f"{prefix}.{name}": value for name, value in (card.numbers or {}).items()}
        return {
            "license": card.licence, "modelfile": f"FROM {self._host.name}\n",
            "parameters": f"num_ctx {card.context}", "template": card.template, "system": "",
            "details": card.details, "model_info": info, "capabilities": card.capabilities,
            "modified_at": card.modified,
        }  # fmt: skip


def _named(name: str) -> Frame:
    return {"name": name, "model": name}


def known_as(name: str | None, names: Iterable[str]) -> str | None:
    """The server's name of a model that a client names with Ollama's tag for "no tag given"."""
    if name is None or name in names or not name.endswith(LATEST):
        return name or None
    return name.removesuffix(LATEST)
