"""The `camcal` command, also run by `python -m camcal`: serving and training."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import camcal
from camcal.service.command.cli import app as serving
from camcal.training.command.cli import app as training

app = typer.Typer(
    name="camcal",
    help="Train image classifiers on long-tailed data; serve calibrated probabilities with exact heatmaps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(serving)
app.add_typer(training)


def _print_version(enabled: bool) -> None:
    if enabled:
        typer.echo(f"camcal {camcal.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "140")
    app()


if __name__ == "__main__":
    main()
