"""Error reporting of the commands: one sentence on standard error, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from camcal.printable import printable

# Packages that belong to an extra, and how to install it.
_EXTRAS = {
    "opentelemetry.sdk": "CAMCAL_OTEL needs the OpenTelemetry SDK, which is not installed: pip install 'camcal[otel]'",
    "onnxruntime": "onnxruntime is not installed: pip install 'camcal[cpu]', or 'camcal[gpu]' for CUDA",
}


def print_error(message: str) -> None:
    """Write `message` to standard error, with control characters escaped."""
    typer.echo(printable(f"error: {message}"), err=True)


def fail(message: str, report: Callable[[str], None] = print_error) -> NoReturn:
    """Report `message` and exit with code 2."""
    report(message)
    raise typer.Exit(2)


@contextmanager
def exit_on_user_error(
    kinds: tuple[type[Exception], ...] = (ValueError, OSError), report: Callable[[str], None] = print_error
) -> Iterator[None]:
    """Turn user errors into one sentence and exit code 2. All other errors keep their traceback.

    Args:
        kinds: exceptions that are user errors.
        report: receives the sentence.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        fail(_EXTRAS[error.name], report)
    except kinds as error:
        has_path = isinstance(error, OSError) and error.filename
        fail(f"{error.filename}: {error.strerror}" if has_path else str(error), report)  # type: ignore[attr-defined]
