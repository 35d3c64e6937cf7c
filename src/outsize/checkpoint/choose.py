"""Which files of a folder or repository are the model: by their names, so that the same is chosen before a
download and after it.

With config.json and safetensors beside it: those (exactly the shards of the index). Else a GGUF: the only
one, or of several quantizations of one model the first of PREFERRED, plain (m-Q4_K_M) before prefixed
(m-UD-Q4_K_XL, m.i1-Q4_K_M). Projectors (mmproj) and importance matrices are never the model; adapters,
drafts and MTP heads are not where there is anything else. What remains in doubt is asked for by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from outsize.checkpoint.file_names import (
    SIDECARS,
    Quantization,
    base_name,
    cut_files,
    folder_and_file,
    is_never_a_model,
    is_rarely_a_model,
    is_shadow,
    is_template,
    join_command,
    parts_of,
    quantization,
)
from outsize.checkpoint.quantized import QUANTIZED
from outsize.checkpoint.safetensors_shards import INDEX, weights
from outsize.checkpoint.spec import is_inside
from outsize.errors import CheckpointError, SourceError, UnsupportedError

# Quantizations, best first: about 4 bits, then more, then fewer. Below 4 bits an IQ type stands beside those
# of its quality, not of its size; ternary ones are good only for models that were trained so.
PREFERRED = (
    "Q4_K_M", "Q4_K_S", "Q4_K_L", "Q4_K_XL", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q5_K_S",
    "Q5_K_L", "Q5_K_XL", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8_K_XL", "MXFP4",
    "MXFP4_MOE", "NVFP4", "BF16", "F16", "F32", "Q3_K_L", "Q3_K_XL", "Q3_K_M", "Q3_K", "IQ3_M", "IQ3_S",
    "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K_XL", "Q2_K", "IQ2_M", "Q2_K_S", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
)  # fmt: skip
SHOWN = 8  # names in an error


def _no_type(name: str) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or repository to choose from."""

    text: str  # as its user named it
    names: tuple[str, ...]  # of its files, relative, with /
    read: Callable[[str], Mapping[str, object]]  # a JSON file of it
    hint: str  # how one of several is named
    type_of: Callable[[str], str] = _no_type  # "general.type" of a GGUF, where it is cheap to know

    def below(self, folder: str) -> Place:
        """A folder of it, as a place of its own."""
        if not folder:
            return self
        start = folder + "/"
        names = tuple(n.removeprefix(start) for n in self.names if n.startswith(start))
        read, type_of = self.read, self.type_of
        return replace(
            self, text=f"{self.text}:{folder}", names=names,
            read=lambda name: read(start + name), type_of=lambda name: type_of(start + name),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of one model."""

    at: str  # what to open: a file, or a folder ("" is the whole place)
    files: tuple[str, ...]

    def under(self, folder: str) -> Choice:
        at = f"{folder}/{self.at}" if self.at else folder
        return Choice(at, tuple(f"{folder}/{name}" for name in self.files))


def choose(place: Place, wish: str = "") -> Choice:
    """The model of a place; `wish` names a file, a folder or a quantization. Raises UserError."""
    place = replace(
        place, names=tuple(sorted(n for n in place.names if is_inside(n) and not is_shadow(n)))
    )
    return _named(place, wish) if wish else _default(place)


def _default(place: Place) -> Choice:
    if "config.json" in place.names and _tensor_files(place):
        return _folder(place)
    ggufs = _models(place)
    if ggufs:
        return _gguf(place, _only(place, ggufs))
    raise _nothing(place)


def _tensor_files(place: Place) -> list[str]:
    top = [n for n in place.names if "/" not in n and n.endswith(".safetensors")]
    others = ("consolidated", "adapter_model")
    return [n for n in top if not n.startswith(others)] + [n for n in place.names if n == INDEX]


def _folder(place: Place, file: str = "") -> Choice:
    """A safetensors model; by one file of it where `file` is none of its own."""
    small = [n for n in place.names if n in (*SIDECARS, *QUANTIZED, INDEX) or is_template(n)]
    files = weights(place.names, place.read, file, place.text)
    return Choice(file, tuple(dict.fromkeys([*small, *files])))


def _models(place: Place) -> list[str]:
    """The GGUFs that may be the model: of a split one its first part."""
    found = [n for n in place.names if n.lower().endswith(".gguf") and _is_first(n)]
    found = [n for n in found if not is_never_a_model(n)]
    found = [n for n in found if not is_rarely_a_model(n)] or found
    if len(found) > 1:
        found = [n for n in found if place.type_of(n) in ("", "model")] or found
    return found


def _is_first(name: str) -> bool:
    """Of its parts; a number of parts that cannot be is no model's."""
    try:
        return name == parts_of(name)[0]
    except CheckpointError:
        return False


def _only(place: Place, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if len({base_name(n) for n in names}) == 1:
        known = {n: quantization(n) for n in names}
        for tag in PREFERRED:
            found = _plain_first(known, Quantization("", tag))
            if len(found) == 1:
                return found[0]
            if found:
                raise _several(place, found)
    raise _several(place, names)


def _plain_first(known: Mapping[str, Quantization], wanted: Quantization) -> list[str]:
    """The names of a quantization; without a prefix in what is wanted, plain ones before prefixed."""
    exact = [n for n, q in known.items() if q == wanted]
    if exact or wanted.prefix:
        return exact
    return [n for n, q in known.items() if q.tag == wanted.tag]


def _several(place: Place, names: list[str]) -> SourceError:
    return SourceError(f"{place.text} holds {len(names)} models; {place.hint}: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _gguf(place: Place, name: str) -> Choice:
    parts = parts_of(name)
    missing = [p for p in parts if p not in place.names]
    if missing:
        raise CheckpointError(
            f"{place.text}: {len(missing)} of {len(parts)} parts of {name} are missing, the first is "
            f"{missing[0]}; put them in the same folder"
        )
    return Choice(parts[0], tuple(parts))


def _named(place: Place, wish: str) -> Choice:
    if wish in place.names:
        return _file(place, wish)
    if any(n.startswith(wish + "/") for n in place.names):
        return _default(place.below(wish)).under(wish)
    known = {n: quantization(n) for n in _models(place)}
    found = _plain_first(known, quantization(wish)) if quantization(wish).tag else []
    # Of a longer name, as of another model's file, a quantization is not the wish.
    if found and not base_name(wish):
        if len(found) > 1:
            raise _several(place, found)
        return _gguf(place, found[0])
    raise _absent(place, wish, list(known))


def _file(place: Place, name: str) -> Choice:
    if name.lower().endswith(".gguf"):
        return _gguf(place, name)
    if name.endswith(".safetensors"):
        folder, file = folder_and_file(name)
        inner = place.below(folder)
        own = weights(inner.names, inner.read, file, inner.text)
        choice = _folder(inner, "" if own != [file] or file == "model.safetensors" else file)
        return choice.under(folder) if folder else choice
    refuse_cut(place.text, name, place.names)
    raise SourceError(f"{place.text}: {name} is not a model; name a .gguf or .safetensors file")


def _absent(place: Place, wish: str, models: list[str]) -> SourceError:
    near = difflib.get_close_matches(wish, {*place.names, *models}, 4, 0.5)
    there = _listed(near or models or place.names) or "nothing"
    what = "there are, for example," if near else "there are"
    return SourceError(f"{place.text}: no file, folder or quantization {wish!r}; {what} {there}")


def refuse_cut(where: str, name: str, names: Iterable[str]) -> None:
    """Raises UnsupportedError if a file is a piece of one that was cut by bytes, as others of `names` are."""
    pieces = cut_files(name, names)
    if pieces:
        raise UnsupportedError(
            f"{where}: {name} is a piece of a file that was cut by bytes; with all pieces at hand (here "
            f"{len(pieces)}), join them by `{join_command(pieces)}` and give the whole file"
        )


def _nothing(place: Place) -> CheckpointError | SourceError | UnsupportedError:
    """What is there, as the reason why it is no model."""
    names, top = place.names, [n for n in place.names if "/" not in n]
    for name in names:
        refuse_cut(place.text, name, names)
    never = [n for n in names if n.lower().endswith(".gguf")]
    pickles = [n for n in top if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "adapter_config.json" in top:
        return UnsupportedError(
            f"{place.text} is an adapter (adapter_config.json), not a model; give the model that it "
            "belongs to, and this to --adapter"
        )
    if any(n.startswith("consolidated") for n in top):
        return UnsupportedError(
            f"{place.text} has its weights in Mistral's own layout (consolidated), which outsize does not "
            "read; use a version with model.safetensors, or a GGUF"
        )
    if pickles:
        return UnsupportedError(
            f"{place.text} has its weights in pickle files ({pickles[0]}), which can run code and are not "
            "read; use a safetensors or GGUF version, or save it with save_pretrained (safetensors)"
        )
    if never:
        return SourceError(
            f"{place.text} holds no language model but {_listed(never)}; give the .gguf of the model"
        )
    folders = sorted(
        {n.split("/")[0] for n in names if n.endswith((".gguf", ".safetensors")) and "/" in n}
    )
    if folders:
        return SourceError(
            f"{place.text} holds models in folders; {place.hint}: {_listed(folders)}"
        )
    if "config.json" in top:
        return CheckpointError(f"{place.text}: no .safetensors file beside config.json; fetch them")
    return CheckpointError(f"{place.text}: no config.json in this folder, so it is not a model")
