"""Checks of the environment that come before any value is read: misspelt variables, empty guards, secrets in files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

PREFIX = "CAMCAL_"
FILE = "_file"  # CAMCAL_X_FILE names the file that holds the secret CAMCAL_X
MAX_SECRET_BYTES = 4096

# Variables with our prefix that are no settings: of training, and those that Kubernetes sets in every pod beside a
# Service named camcal.
_OTHERS = re.compile(r"commit|service_host|service_port\w*|port_\d+_\w+")


class SettingsError(ValueError):
    """An environment variable or option with a value that cannot be used; the message is one sentence."""


def read(
    environment: Mapping[str, str], *, fields: Collection[str], secrets: Collection[str], guards: Collection[str]
) -> dict[str, str]:
    """The secrets that the variables CAMCAL_X_FILE name, after a check of all variables with our prefix.

    Args:
        environment: such as `os.environ`.
        fields: the settings, in lower case.
        secrets: those of them that a file may hold.
        guards: those of them that shut somebody out. An empty one would leave a door open that was meant to be shut.

    Raises:
        SettingsError: naming the variable, what was found, and what to do.
    """
    given = {
        name.lower().removeprefix(PREFIX.lower()): value
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
    }
    files = {name + FILE: name for name in secrets}
    for name, value in given.items():
        if name not in fields and name not in files and not _OTHERS.fullmatch(name):
            raise SettingsError(_unknown(name, [*fields, *files]))
        if not value and (name in guards or name in files):
            raise SettingsError(f"{variable(name)} is empty; give it a value, or unset it to do without")
    found = {}
    for name, secret in files.items():
        if name in given:
            if secret in given:
                raise SettingsError(f"{variable(secret)} and {variable(name)} are both set; keep one of them")
            found[secret] = _content(variable(name), Path(given[name]))
    return found


def variable(field: str) -> str:
    """The variable of a setting."""
    return f"{PREFIX}{field.upper()}"


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {variable(close[0])}?" if close else "unset it; docs/serving.md lists the settings"
    return f"{variable(name)} is not a setting; {hint}"


def _content(name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).decode().strip()
    except OSError as error:
        raise SettingsError(f"{name} is {str(path)!r}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name} is {str(path)!r}, which is not a text file") from None
    if not secret:
        raise SettingsError(f"{name} is {str(path)!r}, an empty file; it should hold the secret")
    if len(secret) > MAX_SECRET_BYTES:
        raise SettingsError(f"{name} is {str(path)!r}, of more than {MAX_SECRET_BYTES} bytes")
    return secret
