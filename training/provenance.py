"""Where figures come from: the version and commit of the code, and the machine."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch

import camcal
from camcal.cpus import usable_cpus
from camcal.models.report import Made

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit of the running code, with `+` appended if tracked code differs; None outside of a clone.

    The variable CAMCAL_COMMIT overrides it, for copies of the code without history.
    """
    if given := os.environ.get("CAMCAL_COMMIT"):
        return given
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "models", "training")
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


COMMIT = commit()
"""The commit of the code in this process; the clone may have moved on when training ends."""


@functools.cache
def code_digest() -> str:
    """Digest of the source files that determine the logits of an image: `models` and `training/data`."""
    files = [file for folder in ("models", "training/data") for file in sorted((ROOT / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def hardware(device: torch.device) -> str:
    """One line about the machine: processor, its cores, and torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cores = usable_cpus()
        name = f"{_processor()}, {cores} core{'' if cores == 1 else 's'}"
    return f"{name}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def made_with(device: torch.device) -> Made:
    """Version, commit, hardware and today's date, for a report."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Made(version=camcal.__version__, commit=COMMIT, hardware=hardware(device), date=today)


def also_made_with(before: list[Made], device: torch.device) -> list[Made]:
    """The list so far, with this process added if its version, commit or hardware differs from the last."""
    now = made_with(device)
    same = before and before[-1].model_copy(update={"date": now.date}) == now
    return before if same else [*before, now]
