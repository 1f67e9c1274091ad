"""The parsers under atheris, where it can be imported."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.findings import Findings
from tests.fuzz.targets import ROOT, TARGETS


def guided(runs: int, seed: int) -> Findings:
    """Try `runs` inputs on each parser."""
    findings = Findings("parsers under atheris")
    if find_spec("atheris") is None:
        findings.row("skipped", "atheris is not installed; the tests fuzz the same parsers with hypothesis")
        return findings
    for name in TARGETS:
        with tempfile.TemporaryDirectory(prefix="camcal-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz.guided", name, str(runs), str(seed), folder]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            covered = re.findall(r"#(\d+).*? cov: (\d+)", ended.stderr)
            findings.row(name, "{} inputs, {} edges".format(*covered[-1]) if covered else "no input tried")
            for crash in Path(folder).glob("*-*"):
                last = [line for line in ended.stderr.splitlines() if "Error" in line][:1]
                findings.faults.append(f"{name}: {' '.join(last)} for {crash.read_bytes()[:300]!r}")
            if ended.returncode and not findings.faults:
                findings.faults.append(f"{name} ended with code {ended.returncode}: {ended.stderr[-1000:]}")
    return findings
