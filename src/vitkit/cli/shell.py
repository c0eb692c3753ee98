"""The entry point: finds the verb, and turns errors into one paragraph and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitkit import __version__
from vitkit.errors import VitkitError

#: verb -> (``"module:function"`` of its command, its line in ``vitkit --help``); imported only when invoked
VERBS: dict[str, tuple[str, str]] = {
    "study": ("vitkit.cli.study:study", "Compare methods side by side on your images; writes a report."),
    "predict": ("vitkit.cli.predict:predict", "Label images with a model that a study exported."),
    "deploy": ("vitkit.cli.deploy:deploy", "Find the fastest engine that still answers like a model."),
    "serve": ("vitkit.cli.serve:serve", "Put a model behind HTTP, with a page to try it."),
    "methods": ("vitkit.cli.methods:methods", "List the methods that can be used, by kind."),
    "show": ("vitkit.cli.show:show", "Explain a method or paper: usage, options, evidence."),
    "papers": ("vitkit.cli.papers:app", "List the published systems; read and write digests."),
    "evidence": ("vitkit.cli.evidence:evidence", "Run the small experiment behind a method's claim."),
}

EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


class _Verbs(TyperGroup):
    """A group whose help comes from :data:`VERBS` and whose commands are imported when invoked."""

    _listing = False
    debug = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        stub = super().get_command(ctx, cmd_name)
        if stub is None or self._listing:
            return stub
        return _command(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # --debug works before and after the verb; what follows a bare -- belongs to the verb
        end = args.index("--") if "--" in args else len(args)
        self.debug = "--debug" in args[:end]
        return super().parse_args(ctx, [a for a in args[:end] if a != "--debug"] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VitkitError as error:
            if self.debug:
                raise
            say(f"Error: {error}")
            raise typer.Exit(EXIT_USER) from error
        except KeyboardInterrupt as error:
            if self.debug:
                raise
            say("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            # `| head` has seen enough; Python would complain once more when it flushes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit() from error


def say(text: str) -> None:
    """One paragraph on stderr."""
    print(" ".join(text.split()), file=sys.stderr)


def _command(verb: str) -> Any:
    target, line = VERBS[verb]
    module_name, _, attribute = target.partition(":")
    try:
        function = getattr(import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise VitkitError(f"`vitkit {verb}` is not part of this installation ({module_name} is absent).") from error
        raise
    if isinstance(function, typer.Typer):
        # a verb with verbs of its own
        return typer.main.get_group(function)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    # the function's docstring, where it has one, says more than the line in the list
    single.command(verb, help=function.__doc__ or line)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Verbs,
    name="vitkit",
    help="Published vision-transformer methods as parts for any ViT, compared on your own images.",
    epilog="Start with: vitkit study digits",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _stub() -> None:
    """Stands for a verb in the list; never invoked."""


for _verb, (_, _line) in VERBS.items():
    app.command(_verb, help=_line)(_stub)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vitkit {__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(run: Callable[[], Any] = app) -> None:
    """Run the command line; every failure ends as one paragraph on stderr, unless ``--debug`` is given."""
    try:
        run()
    except KeyboardInterrupt:
        say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # what arrives here is no VitkitError, so it is a fault of ours (or of --debug's own wish)
        if "--debug" in sys.argv:
            raise
        if isinstance(error, VitkitError):
            say(f"Error: {error}")
            sys.exit(EXIT_USER)
        say(
            f"Unexpected {type(error).__name__}: {error}. This is a fault of vitkit; the same command with --debug "
            "shows where it happened."
        )
        sys.exit(EXIT_BUG)
