"""Checks of environment variables before their values are parsed: misspelt names, empty values, secrets in files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

PREFIX = "CAMCAL_"
FILE = "_file"  # CAMCAL_X_FILE is the path of a file that contains the secret CAMCAL_X
MAX_SECRET_BYTES = 4096

# Variables with our prefix that are not settings of the service: one is for training, and Kubernetes sets the others in
# every pod of a namespace that has a Service named camcal.
_NOT_SETTINGS = re.compile(r"commit|service_host|service_port\w*|port_\d+_\w+")


class SettingsError(ValueError):
    """An environment variable or option has an invalid value. The message is one sentence."""


def read(
    environment: Mapping[str, str], *, fields: Collection[str], secrets: Collection[str], guards: Collection[str]
) -> dict[str, str]:
    """Check all variables with our prefix, and read the secrets from the files in CAMCAL_X_FILE.

    Args:
        environment: variables, such as `os.environ`.
        fields: names of the settings, in lower case.
        secrets: the settings that may be read from a file.
        guards: the settings that restrict access. An empty value is an error: it would silently lift the restriction.

    Raises:
        SettingsError: with the variable, its value and how to fix it.
    """
    variables = {
        name.lower().removeprefix(PREFIX.lower()): value
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
    }
    files = {name + FILE: name for name in secrets}
    for name, value in variables.items():
        if name not in fields and name not in files and not _NOT_SETTINGS.fullmatch(name):
            raise SettingsError(_unknown(name, [*fields, *files]))
        if not value and (name in guards or name in files):
            raise SettingsError(f"{variable(name)} is empty; set a value or unset the variable")
    values = {}
    for name, secret in files.items():
        if name in variables:
            if secret in variables:
                raise SettingsError(f"{variable(secret)} and {variable(name)} are both set; unset one of them")
            values[secret] = _content(variable(name), Path(variables[name]))
    return values


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field.upper()}"


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {variable(close[0])}?" if close else "see the list of settings in docs/reference/settings.md"
    return f"unknown setting {variable(name)}; {hint}"


def _content(name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).decode().strip()
    except OSError as error:
        raise SettingsError(f"{name} is {str(path)!r}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name} is {str(path)!r}: the file is not UTF-8 text") from None
    if not secret:
        raise SettingsError(f"{name} is {str(path)!r}: the file is empty; expected the secret")
    if len(secret) > MAX_SECRET_BYTES:
        raise SettingsError(f"{name} is {str(path)!r}: the file is larger than {MAX_SECRET_BYTES} bytes")
    return secret
