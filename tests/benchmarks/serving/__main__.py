"""`make bench-serving`: camcal beside LitServe, BentoML, Ray Serve and plain FastAPI, in rounds on one machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.benchmarks.serving import photos, report, rounds
from tests.benchmarks.serving.servers import CAMCAL, ROOT, SERVERS

RESULTS = ROOT / "docs" / "benchmarks"
SHIPPED = ROOT / "models" / "pretrained" / "caltech100"
# Rounds and seconds for each step: ResNet-50 answers 30 images a second, and gets 16 minutes of the run's 35.
PLANS = {"shipped": (2, 10.0), "resnet50": (2, 6.0)}


def _list(text: str, known: list[str] | None = None) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if known and name not in known:
            raise typer.BadParameter(f"{name!r} is none of: {', '.join(known)}")
    return names


def hardware() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The checked-out commit, or an empty string outside a clone."""
    result = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def main(
    models: Annotated[str, typer.Option(help="Of: shipped, resnet50.")] = "shipped,resnet50",
    only: Annotated[str, typer.Option(help=f"Servers, of: {', '.join(SERVERS)}.")] = ",".join(SERVERS),
    clients: Annotated[str, typer.Option(help="Closed loops to run, in clients.")] = "1,8,32,64",
    seconds: Annotated[float | None, typer.Option(help="Of each step; by default 10, and 6 for ResNet-50.")] = None,
    number: Annotated[int | None, typer.Option("--rounds", help="By default 2.")] = None,
    overload: Annotated[float, typer.Option(help="Seconds of three times capacity against camcal; 0: none.")] = 60.0,
    growth: Annotated[int, typer.Option(help="Only watch camcal's memory over so many requests.")] = 0,
    decoder: Annotated[str, typer.Option(help="Of the peers: camcal's own, or pillow.")] = "camcal",
    bundle: Annotated[Path, typer.Option(help="The bundle of the model `shipped`.")] = SHIPPED,
    camcal: Annotated[Path, typer.Option(help="The bin folder that camcal runs from.")] = ROOT / ".venv" / "bin",
    work: Annotated[Path, typer.Option(help="Folder for the peers' environments, photographs and logs.")] = ROOT
    / ".venv-bench",
    out: Annotated[Path | None, typer.Option(help="Folder for serving.json and serving.md.")] = None,
) -> None:
    """Write serving.json and serving.md: into docs/benchmarks for a full run, beside the logs for any other."""
    names, chosen = _list(only, list(SERVERS)), _list(models, list(PLANS))
    _list(decoder, list(report.DECODERS))
    if "shipped" in chosen and not (bundle / "manifest.json").is_file():
        raise typer.BadParameter(f"no bundle at {bundle}; name one with --bundle")
    if CAMCAL.name in names and not (camcal / "python").exists():
        raise typer.BadParameter(f"no {camcal / 'python'}; use `make bench-serving`, or name another with --camcal")
    narrowed = seconds or number or growth or decoder != "camcal" or clients != "1,8,32,64" or names != list(SERVERS)
    out = out or (work / "results" if narrowed else RESULTS)
    photos.write_photos(work / "photos")
    os.environ["BENCH_DECODER"] = decoder
    out.mkdir(parents=True, exist_ok=True)
    path = out / "serving.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"models": {}}
    results |= {"hardware": hardware(), "decoder": decoder}
    bench = rounds.Bench(work, camcal, [CAMCAL.name] if growth else names)
    if not growth or "generator" not in results:
        results["generator"] = bench.generator(min(seconds or 5, 5))
    for model in chosen:
        folder = _bundle(model, bundle, work)
        plan = rounds.Plan(
            bundle=folder,
            clients=[int(count) for count in _list(clients)],
            rounds=number or PLANS[model][0],
            seconds=seconds or PLANS[model][1],
            overload_s=overload,
        )
        began = time.monotonic()
        if growth:
            results["growth"] = bench.growth(plan, growth) | _made(began)
            _write(out, results)
            break
        for measured in bench.measure(plan):
            results["models"][model] = measured | _made(began)
            _write(out, results)
    print(f"written to {out}", file=sys.stderr)


def _made(began: float) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "commit": commit(),
    }


def _bundle(model: str, shipped: Path, work: Path) -> Path:
    if model == "shipped":
        return shipped.resolve()
    from tests.benchmarks.serving.bundles import random_weights  # brings torch, which takes its time

    return random_weights(work / "resnet50")


def _write(out: Path, results: dict[str, Any]) -> None:
    (out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "serving.md").write_text(report.markdown(results))


if __name__ == "__main__":
    typer.run(main)
