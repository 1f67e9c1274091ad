"""The commands `serve`, `predict`, `inspect`, `key new` and `add-canary`.

Heavy imports stay inside the commands: `--help` is quick, and `predict` loads no web server.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from camcal.printable import printable, printable_lines
from camcal.service import logs
from camcal.terminal import exit_on_user_error, fail, print_error

if TYPE_CHECKING:
    from camcal.models.bundle import Bundle
    from camcal.models.report import GroupCalibration
    from camcal.service.command.offline import FilePrediction
    from camcal.service.engine.session import Session
    from camcal.service.settings import Settings

app = typer.Typer()

keys = typer.Typer(help="Manage API keys (CAMCAL_API_KEYS_FILE).", no_args_is_help=True)
app.add_typer(keys, name="key")

BundleOption = Annotated[
    Path | None, typer.Option(help="Folder of the bundle (default: CAMCAL_BUNDLE or the shipped one).")
]
DeviceOption = Annotated[str | None, typer.Option(help="Device: auto, cpu or cuda (default: auto).")]


class _Serve(TyperCommand):
    """Reports invalid options in the log format."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        if os.environ.get("CAMCAL_LOG_FORMAT") == "json":
            logs.only_json()
        try:
            return super().make_context(*arguments, **options)
        except Exception as error:
            if not logs.in_json() or not hasattr(error, "format_message"):
                raise
            fail(error.format_message(), _report)


@app.command(cls=_Serve)
def serve(
    bundle: BundleOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default: 8000).")] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket to listen on, instead of host and port.")] = None,
    device: DeviceOption = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes (default: 1).")] = None,
) -> None:
    """Serve a bundle over HTTP. All CAMCAL_ environment variables apply; options take precedence."""
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # no model to reload yet
    # Process 1 of a container ignores SIGTERM unless it has a handler; the server installs its own later.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as stack:
        stack.callback(logs.drop_unwritten)
        with exit_on_user_error(report=_report):
            from camcal.service.process.listening import ListenError, Listeners

            settings = _settings(bundle=bundle, host=host, port=port, uds=uds, device=device, workers=workers)
            if settings.workers > 1 and not hasattr(os, "fork"):
                raise ValueError(
                    f"CAMCAL_WORKERS is {settings.workers}, but this system cannot fork processes; use 1 worker"
                )
            listeners = stack.enter_context(Listeners(settings))  # before the model, which is slow to load
            if settings.otel:
                import_module("opentelemetry.sdk")
            from camcal.service.engine.model import load_proven
            from camcal.service.engine.proofs import Proofs

            if settings.workers > 1:
                from camcal.service.process.supervisor import Supervisor

                return Supervisor(settings, listeners).run()
            sessions = load_proven(settings, Proofs())
        from camcal.service.process.single import serve as run

        with exit_on_user_error((ListenError,), _report):
            run(settings, sessions, listeners)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...|FOLDER", help="Image files or folders.")],
    bundle: BundleOption = None,
    cam: Annotated[
        Path | None, typer.Option(help="Write heatmaps of the top class: a PNG file, or a folder for several images.")
    ] = None,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Put the image, its plain and calibrated heatmaps and the runner-up's into one --cam picture.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .jsonl file instead of a table.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of classes per image (default: as over HTTP).")] = None,
    prior: Annotated[
        str, typer.Option(help="Class prior: balanced, train, or given (the model's own prior).")
    ] = "balanced",
    device: DeviceOption = None,
) -> None:
    """Classify images. Images that fail are listed on standard error, and the exit code is 1."""
    with exit_on_user_error():
        from camcal.service.command.offline import draw_top, find_images, predict_files
        from camcal.service.command.output import CamWriter, open_writer
        from camcal.service.engine.decoding import Limits
        from camcal.service.engine.ranking import Ranker
        from camcal.service.heatmaps.sheet import sheet

        if grid and not cam:
            raise ValueError("--grid needs --cam; add --cam FILE.png")
        files = find_images(images)
        settings = _settings(bundle=bundle, device=device)
        session = _session(settings)
        ranker = Ranker(session.bundle.manifest)
        count, checked_prior = ranker.check_top_k(top_k), ranker.check_prior(prior)
        cams = CamWriter(cam, files, single=len(images) == 1 and images[0].is_file()) if cam else None
        limits = Limits(max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
        draw = (sheet if grid else draw_top) if cams else None
        predictions = predict_files(session, files, top_k=count, prior=checked_prior, limits=limits, draw=draw)
        failed = 0
        with open_writer(out) as write:
            for prediction in _progress(predictions, len(files)):
                if prediction.error is not None:
                    failed += 1
                    typer.echo(printable(f"{prediction.path}: {prediction.error}"), err=True)
                    continue
                write(prediction)
                if cams and prediction.heatmap:
                    cams.write(prediction.path, prediction.heatmap)
    if failed:
        typer.echo(f"{failed} of {len(files)} images failed", err=True)
        raise typer.Exit(1)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Verify a bundle's checksums and print a summary."""
    with exit_on_user_error():
        from camcal.models.bundle import Bundle

        loaded = Bundle.load(bundle)
    text = loaded.manifest.model_dump_json(indent=2) if as_json else "\n".join(map(printable, _summary(loaded)))
    typer.echo(printable_lines(text))


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the key: letters, digits, _ and -.")],
    routes: Annotated[
        str | None,
        typer.Option(help="Route groups, of predict,cam,model,v2,metrics (default: all but metrics)."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Rate limit in requests per second (default: none).")] = None,
) -> None:
    """Generate an API key. Standard error shows the key once; standard output has its line for the keys file."""
    with exit_on_user_error():
        from camcal.service.keys import DEFAULT_GROUPS, new_key

        groups = DEFAULT_GROUPS if routes is None else [route.strip() for route in routes.split(",")]
        key, line = new_key(name, groups, rate)
    typer.echo(f"API key {name}; it is not stored, so save it now:\n{key}", err=True)
    typer.echo("Line for the keys file (CAMCAL_API_KEYS_FILE):", err=True)
    typer.echo(line)


@app.command("add-canary")
def add_canary(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> None:
    """Record a bundle's outputs on test images, which servers check before use. `train` and `export` do this too."""
    with exit_on_user_error():
        from camcal.service.engine.canary import add_canary as add

        updated = add(bundle)
    typer.echo(f"{updated.path}: {_canary(updated)}")


@app.command(hidden=True)
def openapi() -> None:
    """Print the OpenAPI document as YAML."""
    import yaml

    from camcal.service.http.app import create_app
    from camcal.service.http.app import openapi as document

    typer.echo(yaml.safe_dump(document(create_app()), sort_keys=False, allow_unicode=True, width=120), nl=False)


def _report(message: str) -> None:
    """Report an error in the log format."""
    if logs.in_json():
        logs.log.critical(message)
    else:
        print_error(message)


def _settings(**overrides: Any) -> Settings:
    from camcal.service.settings import load_settings

    return load_settings(**overrides)


def _session(settings: Settings) -> Session:
    from camcal.service.engine.session import load_session

    return load_session(settings)


def _progress(predictions: Iterator[FilePrediction], total: int) -> Iterator[FilePrediction]:
    """`predictions`, with a progress bar if standard error is a terminal."""
    if not sys.stderr.isatty() or total < 2:
        return predictions
    from rich.console import Console
    from rich.progress import track

    return iter(track(predictions, "predicting", total=total, console=Console(stderr=True), transient=True))


def _summary(bundle: Bundle) -> list[str]:
    from camcal.models.bundle import GROUPS

    manifest = bundle.manifest
    groups = [info.group for info in manifest.classes]
    counts = sorted(info.train_count for info in manifest.classes)
    rule, calibration = manifest.preprocessing, manifest.calibration
    return [
        f"{manifest.name} {manifest.version}, created {manifest.created}",
        f"classes        {len(groups)}: " + ", ".join(f"{groups.count(group)} {group}" for group in GROUPS),
        f"training       {sum(counts)} images including held-out images, {counts[0]} to {counts[-1]} per class",
        f"preprocessing  {rule.fit} to {rule.resize} px"
        + ("" if rule.fit == "letterbox" else f", then centre crop to {rule.input_size}×{rule.input_size}"),
        f"views          {'the image and its mirror image' if manifest.views == 'flip' else 'the image'}",
        f"heatmaps       {manifest.grid[0]}×{manifest.grid[1]}",
        f"calibration    scalar {calibration.scalar:.4g}, temperature {calibration.temperature:.4g}, "
        f"omega {min(calibration.omega):.4g} to {max(calibration.omega):.4g}, "
        f"beta {min(calibration.beta):.4g} to {max(calibration.beta):.4g}",
        *(f"  {name:<28} {value}" for name, value in _flat("", manifest.figures)),
        *_by_predicted_group((bundle.report.by_predicted_group or {}).get("calibrated", {})),
        f"canary         {_canary(bundle)}",
        f"files          {len(manifest.files)}, checksums verified",
    ]


def _canary(bundle: Bundle) -> str:
    if bundle.canary is None:
        return f"none; add one with `camcal add-canary {bundle.path}`"
    return f"outputs on {len(bundle.canary.top_classes)} test images, checked at startup and reload"


def _by_predicted_group(groups: dict[str, GroupCalibration | None]) -> Iterator[str]:
    """One line per group of the predicted class: mean confidence and accuracy of these predictions."""
    for group, figures in groups.items():
        if figures is not None:
            name = f"predicted {group}"
            yield f"  {name:<28} mean confidence {figures.confidence:.1%}, accuracy {figures.accuracy:.1%}"


def _flat(prefix: str, figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested figures as lines: `calibrated.ece`, `0.0213`."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)
