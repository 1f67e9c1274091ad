"""Start a child process that runs a camcal module."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import camcal
from camcal.service.settings import PREFIX


def command(module: str, *arguments: str) -> list[str]:
    """`python -P -m module arguments`: the working directory, which may hold another `camcal`, is not on the path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment plus the path to camcal, without camcal's settings: some of them are secrets."""
    root = str(Path(camcal.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {"PYTHONPATH": path}
