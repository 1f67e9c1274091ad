"""How a process of the service starts another one that runs a module of camcal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import camcal
from camcal.service.settings import PREFIX


def command(module: str, *arguments: str) -> list[str]:
    """`python -m module arguments`, without the working directory on the module path: it may hold another `camcal`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with a path to camcal and without its settings, some of which are secrets."""
    root = str(Path(camcal.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {"PYTHONPATH": path}
