"""The ``merak`` command: one file per subcommand, imported when it is called.

A command raises ValueError (or OSError) for what the user can mend; ``main`` prints it in one line and exits with 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

COMMANDS = {
    "plan": "merak_like.cli.plan",
    "show": "merak_like.cli.show",
    "why": "merak_like.cli.why",
    "diff": "merak_like.cli.diff",
    "what-if": "merak_like.cli.what_if",
    "verify": "merak_like.cli.verify",
    "calibrate": "merak_like.cli.calibrate",
    "html": "merak_like.cli.html_page",
    "simulate": "merak_like.cli.simulate",
    "timeline": "merak_like.cli.timeline",
    "train": "merak_like.cli.train",
    "report": "merak_like.cli.report",
    "export": "merak_like.cli.export",
    "perplexity": "merak_like.cli.perplexity",
    "doctor": "merak_like.cli.doctor",
    "serve": "merak_like.cli.serve",
    "generate": "merak_like.cli.generate",
    "edge": "merak_like.cli.edge",
    "keys": "merak_like.cli.keys",
}
"""Command -> the module whose ``run`` it is. A new command is a new file and a row here."""


class _Lazy(typer.core.TyperGroup):
    """A group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name)(import_module(COMMANDS[cmd_name]).run)
        return typer.main.get_command(alone)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            ctx.fail(f"no command {args[0]!r}{_nearest(args[0])}: there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Lazy, add_completion=False, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        from merak_like import __version__

        typer.echo(f"merak {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Plan, look at and run 3D-parallel training of PyTorch models."""


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, 1)
    return f", perhaps {near[0]!r}" if near else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the input is wrong, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")  # a table outlives an ASCII terminal
    try:
        code = typer.main.get_command(app)(arguments, prog_name="merak", standalone_mode=False)
    except BrokenPipeError:  # `merak show ... | head`
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]  # nothing is left to flush
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if "--debug" in arguments or not _is_for_the_user(error):
            raise
        typer.echo(f"merak: {_told(error)}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _is_for_the_user(error: Exception) -> bool:
    """What a command says about its input; anything else is our bug and keeps its traceback."""
    return isinstance(error, ValueError | OSError) or hasattr(error, "format_message")


def _told(error: Exception) -> str:
    """The message in one line; a mistake in the arguments also says where the help is."""
    told = getattr(error, "format_message", error.__str__)() or type(error).__name__
    context = getattr(error, "ctx", None)
    help_ = f" (see `{context.command_path} --help`)" if context is not None else ""
    return " ".join(told.split()) + help_
