"""The command line: dispatches, and imports each command's package only when it is used."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from serving.errors import UnderstudyError

app = typer.Typer(
    name="understudy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line. What we raise on purpose becomes one line on stderr and exit code 2."""
    try:
        app(prog_name="understudy")
    except UnderstudyError as error:
        print(f"understudy: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"understudy {version('understudy')}")
        except PackageNotFoundError:
            print("understudy (a checkout that isn't installed)")
        raise typer.Exit


@app.callback()
def understudy(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Answer OpenAI-compatible requests with a small student where it provably agrees with the teacher."""


if __name__ == "__main__":
    main()
