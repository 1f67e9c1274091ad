"""Requests made from openapi.yaml by schemathesis, sent to a real server with and without a key."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.fuzz.findings import Findings
from tests.soak.server import ROOT, Server, serving

# A schema cannot say which bodies hold a picture.
UNTRUE = "positive_data_acceptance"


def requests(examples: int, seed: int, bundle: Path, work: Path, phases: str = "coverage,fuzzing,stateful") -> Findings:
    """All checks of schemathesis, for a server that wants no key, and for one that does: with the key, and without."""
    findings = Findings("requests from openapi.yaml")
    key = secrets.token_urlsafe(32)
    for case, settings, header in (
        ("no key wanted", {}, None),
        ("key wanted and sent", {"CAMCAL_API_KEY": key, "CAMCAL_KEY_ATTEMPTS": "0"}, f"X-API-Key: {key}"),
        ("key wanted, not sent", {"CAMCAL_API_KEY": key, "CAMCAL_KEY_ATTEMPTS": "0"}, None),
    ):
        with serving(bundle, work / "server.log", **settings) as server:
            schema = _schema(server, work / "openapi.yaml", key)
            options = ["--max-examples", str(examples), "--seed", str(seed), "--phases", phases]
            options += ["--header", header] if header else []
            ended = _schemathesis(schema, server, options)
        summary = re.findall(r"^ *(\d+) generated.*", ended.stdout, flags=re.MULTILINE)
        findings.row(case, f"{summary[0]} requests" if summary else "no summary")
        if ended.returncode:
            findings.faults.append(f"{case}: {ended.stdout[-6000:]}{ended.stderr[-1000:]}")
        if "Traceback" in (log := (work / "server.log").read_text(errors="replace")):
            findings.faults.append(f"{case}: {log[log.index('Traceback') :][:2000]}")
    return findings


def _schemathesis(schema: Path, server: Server, options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", server.url]
    command += ["--checks", "all", "--exclude-checks", UNTRUE, "--continue-on-failure", "--no-color", *options]
    return subprocess.run(command, cwd=schema.parent, capture_output=True, text=True)  # it leaves a folder there


def _schema(server: Server, file: Path, key: str) -> Path:
    """openapi.yaml with the name and version that are served, and without the header that asks for a 504."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    model = httpx.get(f"{server.url}/model", headers={"X-API-Key": key}, trust_env=False).json()
    for path in document["paths"].values():
        for operation in path.values():
            kept = [p for p in operation.get("parameters", []) if p["name"].lower() != "x-request-timeout-ms"]
            for parameter in kept:
                if parameter["in"] == "path" and parameter["name"] in ("name", "version"):
                    parameter["schema"] = {"type": "string", "enum": [model[parameter["name"]]]}
            operation["parameters"] = kept
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file
