"""The command line. Imports of anything heavy happen inside the commands: --help must be instant."""

from __future__ import annotations

import typer

from outsize.cli import adapt, bench, cache, console, settings
from outsize.cli.chat import chat
from outsize.cli.doctor import doctor
from outsize.cli.inspect import inspect
from outsize.cli.join import join
from outsize.cli.packs import list_packs, pack, rm
from outsize.cli.plan import plan
from outsize.cli.run import run
from outsize.cli.serve import serve
from outsize.cli.trace import trace
from outsize.version import __version__


def version() -> None:
    """The version."""
    print(f"outsize {__version__}")


app = typer.Typer(
    cls=console.Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that outsize the memory you have, and get answers fast.",
)
for command in (run, chat, serve, join, plan, trace, pack):
    app.command()(command)
app.command("list")(list_packs)
for command in (rm, inspect, doctor, version):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(adapt.app, name="adapt")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run a command; print an error as one sentence."""
    settings.end_by_exception()
    console.run(_run, settings.no_color)


def _run() -> None:
    settings.check_environment(app)
    app(default_map=settings.default_map(app))


if __name__ == "__main__":
    main()
