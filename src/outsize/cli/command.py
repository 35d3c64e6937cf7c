"""Commands whose parameters are dataclasses: each field is a flag. typer sees one parameter for each flag,
the function gets objects whose values were checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import cache, update_wrapper
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from outsize.cli.flags import FLAGS, Flag, Texts
from outsize.options import LoadOptions, Options

CONTEXT, GIVEN = "ctx", "given"
REQUIRED = inspect.Parameter.empty


class Choice(NamedTuple):
    """Which fields of a dataclass a command has as flags: these only, or all but these."""

    names: tuple[str, ...]
    kept: bool


def only(*names: str) -> Choice:
    return Choice(names, True)


def without(*names: str) -> Choice:
    return Choice(names, False)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it. A parameter that is a dataclass becomes a flag for each of its fields
    (`Annotated[Kind, only(...)]` or `without(...)`: for some), with the defaults of the parameter's default,
    else the class's. `given` gets the names of the flags on the command line. Others are passed on."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Group] = {}
    plain: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = _bare(hints[name])
        if is_dataclass(kind):
            groups[name] = Group(kind, _note(hints[name], Choice), parameter.default)
        elif name != GIVEN:
            flag, default = _note(hints[name], Flag), parameter.default
            plain[name] = (
                _parameter(name, hints[name], default)
                if flag is None
                else _of_flag(flag, kind, default)
            )

    def call(values: dict[str, Any]) -> None:
        given = on_command_line(values.pop(CONTEXT))
        made = {name: group.make(values, given) for name, group in groups.items()}
        rest = {name: values[parameter.name] for name, parameter in plain.items()}
        command(**rest, **made, **({GIVEN: given} if GIVEN in hints else {}))

    seen = {p.name: p for p in (_parameter(CONTEXT, typer.Context), *plain.values())}
    for group in groups.values():
        seen |= group.parameters
    wrapper: Any = update_wrapper(lambda **values: call(values), command)
    wrapper.__signature__ = inspect.Signature(list(seen.values()))
    wrapper.__annotations__ = {name: p.annotation for name, p in seen.items()}
    made: Callable[..., None] = wrapper
    return made


class Group:
    """The flags of one parameter that is a dataclass."""

    def __init__(self, kind: Any, choice: Choice | None, base: Any) -> None:
        found = dict(_parameters(kind))
        if choice is not None and choice.kept:
            found = {name: found[name] for name in choice.names}
        for name in () if choice is None or choice.kept else choice.names:
            del found[name]
        self._kind, self._base = kind, None if base is REQUIRED else base
        self._flags = {name: flag for name, (flag, _) in found.items()}
        self.parameters: dict[str, inspect.Parameter] = {}
        for name, (flag, parameter) in found.items():
            if self._base is not None and flag.kind is not Texts:
                parameter = parameter.replace(default=getattr(base, name))
            self.parameters[flag.name] = parameter

    def make(self, values: Mapping[str, Any], given: frozenset[str]) -> object:
        """The object. A flag that was given must be of use; a setting of the environment or of config.toml is
        a default for many commands and models, used where it applies. Raises OptionError."""
        chosen = {
            name: values[flag.name] if flag.read is None else flag.read(values[flag.name])
            for name, flag in self._flags.items()
        }
        if self._kind is LoadOptions:
            chosen["defaults"] = frozenset(self._flags) - given
        made = self._kind(**chosen) if self._base is None else replace(self._base, **chosen)
        if isinstance(made, Options):
            made.check_given(given)
        return made


def on_command_line(context: typer.Context) -> frozenset[str]:
    """Names of what stands on the command line itself, not in the environment or config.toml."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(
        name for name, found in sources.items() if found and found.name == "COMMANDLINE"
    )


@cache
def _parameters(kind: Any) -> dict[str, tuple[Flag, inspect.Parameter]]:
    """By field of a dataclass: its flag, as its annotation has it, else FLAGS under the field's name."""
    hints, defaults = get_type_hints(kind, include_extras=True), inspect.signature(kind).parameters
    out: dict[str, tuple[Flag, inspect.Parameter]] = {}
    for name, hint in hints.items():
        flag = _note(hint, Flag) or FLAGS.get(name)
        if flag is not None:
            out[name] = flag, _of_flag(flag, _bare(hint), defaults[name].default)
    return out


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _note(hint: Any, kind: type) -> Any:
    """What an annotation carries of a kind."""
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((note for note in notes if isinstance(note, kind)), None)


def _of_flag(flag: Flag, hint: Any, default: Any) -> inspect.Parameter:
    default = None if flag.kind is Texts else default
    return _parameter(flag.name, Annotated[flag.kind or hint, flag.option()], default)


def _parameter(name: str, hint: Any, default: Any = REQUIRED) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
