"""How a command of camcal ends when something is wrong: one sentence on standard error, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from camcal.printable import printable

# Packages that an extra brings, and how to install it.
_EXTRAS = {
    "opentelemetry.sdk": "CAMCAL_OTEL needs the OpenTelemetry SDK, which is not installed: pip install 'camcal[otel]'",
    "onnxruntime": "onnxruntime is not installed: pip install 'camcal[cpu]', or 'camcal[gpu]' for CUDA",
}


def print_error(message: str) -> None:
    """Write `message` to standard error as text that cannot steer a terminal."""
    typer.echo(printable(f"error: {message}"), err=True)


def fail(message: str, report: Callable[[str], None] = print_error) -> NoReturn:
    """Report `message` and exit with code 2."""
    report(message)
    raise typer.Exit(2)


@contextmanager
def spoken_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, OSError), report: Callable[[str], None] = print_error
) -> Iterator[None]:
    """End a user's mistake with one sentence and exit code 2; any other error keeps its traceback.

    Args:
        kinds: the errors that are a user's mistakes.
        report: receives the sentence.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        fail(_EXTRAS[error.name], report)
    except kinds as error:
        by_file = isinstance(error, OSError) and error.filename
        fail(f"{error.filename}: {error.strerror}" if by_file else str(error), report)  # type: ignore[attr-defined]
