"""The commands of serving: `serve`, `predict`, `inspect`.

Everything heavy is imported inside the commands, so that `--help` is quick and `predict` needs no web server.
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
from camcal.terminal import fail, print_error, spoken_errors

if TYPE_CHECKING:
    from camcal.models.bundle import Bundle
    from camcal.service.command.offline import FilePrediction
    from camcal.service.engine.session import Session
    from camcal.service.settings import Settings

app = typer.Typer()

keys = typer.Typer(help="API keys for CAMCAL_API_KEYS_FILE.", no_args_is_help=True)
app.add_typer(keys, name="key")

BundleOption = Annotated[Path | None, typer.Option(help="Folder of the bundle; by default CAMCAL_BUNDLE's.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]


class _Serve(TyperCommand):
    """Mistakes in its options are in the format of the log too."""

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
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket to listen on, in place of host and port.")] = None,
    device: DeviceOption = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve [1].")] = None,
) -> None:
    """Serve a bundle over HTTP. Every CAMCAL_ variable of the environment applies; options win."""
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    # As the first process of a container, one would not get it at all before the server has a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as stack:
        stack.callback(logs.drop_unwritten)
        with spoken_errors(report=_report):
            from camcal.service.process.listening import ListenError, Listeners

            settings = _settings(bundle=bundle, host=host, port=port, uds=uds, device=device, workers=workers)
            if settings.workers > 1 and not hasattr(os, "fork"):
                raise ValueError(f"{settings.workers} workers need a system that can fork; on this one, serve with one")
            listeners = stack.enter_context(Listeners(settings))  # before the model, which takes a while to load
            if settings.otel:
                import_module("opentelemetry.sdk")
            from camcal.service.engine.model import load_proven
            from camcal.service.engine.proofs import Proofs

            if settings.workers > 1:
                from camcal.service.process.supervisor import Supervisor

                return Supervisor(settings, listeners).run()
            sessions = load_proven(settings, Proofs())
        from camcal.service.process.single import serve as run

        with spoken_errors((ListenError,), _report):
            run(settings, sessions, listeners)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...|FOLDER", help="Image files, or folders of them.")],
    bundle: BundleOption = None,
    cam: Annotated[
        Path | None, typer.Option(help="Write heatmaps of the best class: a PNG, or a folder for several images.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="In --cam: the image, its plain and calibrated map, and the runner-up's.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .jsonl file instead of a table.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Classes shown for each image [5].")] = None,
    prior: Annotated[str, typer.Option(help="Class prior: balanced, train, or the model's own, given.")] = "balanced",
    device: DeviceOption = None,
) -> None:
    """Classify images. A bad image is named on standard error, and the exit code is then 1."""
    with spoken_errors():
        from camcal.service.command.offline import draw_best, find_images, predict_files
        from camcal.service.command.output import CamWriter, open_writer
        from camcal.service.engine.decoding import Limits
        from camcal.service.engine.prediction import Ranker
        from camcal.service.heatmaps.sheet import sheet

        if grid and not cam:
            raise ValueError("--grid says what --cam draws; add --cam FILE.png")
        files = find_images(images)
        settings = _settings(bundle=bundle, device=device)
        session = _session(settings)
        ranker = Ranker(session.bundle.manifest)
        count, wanted = ranker.check_top_k(top_k), ranker.check_prior(prior)
        cams = CamWriter(cam, files, single=len(images) == 1 and images[0].is_file()) if cam else None
        limits = Limits(max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
        draw = (sheet if grid else draw_best) if cams else None
        answers = predict_files(session, files, top_k=count, prior=wanted, limits=limits, draw=draw)
        failed = 0
        with open_writer(out) as write:
            for answer in _progress(answers, len(files)):
                if answer.error is not None:
                    failed += 1
                    typer.echo(printable(f"{answer.path}: {answer.error}"), err=True)
                    continue
                write(answer)
                if cams and answer.heatmap:
                    cams.write(answer.path, answer.heatmap)
    if failed:
        typer.echo(f"{failed} of {len(files)} images could not be predicted", err=True)
        raise typer.Exit(1)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Verify a bundle's checksums and describe it."""
    with spoken_errors():
        from camcal.models.bundle import Bundle

        loaded = Bundle.load(bundle)
    text = loaded.manifest.model_dump_json(indent=2) if as_json else "\n".join(map(printable, _summary(loaded)))
    typer.echo(printable_lines(text))


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, _ and -.")],
    routes: Annotated[
        str | None, typer.Option(help="What it opens, of predict,cam,model,v2,metrics [predict,cam,model,v2].")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second that it may send; by default any.")] = None,
) -> None:
    """Make an API key. It is shown once, on standard error; the line for the keys file goes to standard output."""
    with spoken_errors():
        from camcal.service.keys import DEFAULT_GROUPS, new_key

        wanted = DEFAULT_GROUPS if routes is None else [route.strip() for route in routes.split(",")]
        key, line = new_key(name, wanted, rate)
    typer.echo(f"The API key of {name}, which is shown only now:\n{key}", err=True)
    typer.echo("The line for the file that CAMCAL_API_KEYS_FILE names:", err=True)
    typer.echo(line)


@app.command("add-canary")
def add_canary(bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")]) -> None:
    """Record a bundle's answers on test images, for services to compare; `train` and `export` do so by themselves."""
    with spoken_errors():
        from camcal.service.engine.canary import add_canary as add

        changed = add(bundle)
    typer.echo(f"{changed.path}: {_canary(changed)}")


@app.command(hidden=True)
def openapi() -> None:
    """Print the OpenAPI document as YAML."""
    import yaml

    from camcal.service.http.app import create_app
    from camcal.service.http.app import openapi as document

    typer.echo(yaml.safe_dump(document(create_app()), sort_keys=False, allow_unicode=True, width=120), nl=False)


def _report(message: str) -> None:
    """Report a mistake in the format of the log."""
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


def _progress(answers: Iterator[FilePrediction], total: int) -> Iterator[FilePrediction]:
    """The same answers, with a bar on standard error where a person is looking."""
    if not sys.stderr.isatty() or total < 2:
        return answers
    from rich.console import Console
    from rich.progress import track

    return iter(track(answers, "predicting", total=total, console=Console(stderr=True), transient=True))


def _summary(bundle: Bundle) -> list[str]:
    from camcal.models.bundle import GROUPS

    manifest = bundle.manifest
    groups = [info.group for info in manifest.classes]
    counts = sorted(info.train_count for info in manifest.classes)
    rule, calibration = manifest.preprocessing, manifest.calibration
    return [
        f"{manifest.name} {manifest.version}, made {manifest.created}",
        f"classes        {len(groups)}: " + ", ".join(f"{groups.count(group)} {group}" for group in GROUPS),
        f"training       {sum(counts)} images with those held out, {counts[0]} to {counts[-1]} a class",
        f"preprocessing  {rule.fit} to {rule.resize} px, then the central {rule.input_size}×{rule.input_size}",
        f"heatmaps       {manifest.grid[0]}×{manifest.grid[1]}",
        f"calibration    scalar {calibration.scalar:.4g}, temperature {calibration.temperature:.4g}, "
        f"omega {min(calibration.omega):.4g} to {max(calibration.omega):.4g}, "
        f"beta {min(calibration.beta):.4g} to {max(calibration.beta):.4g}",
        *(f"  {name:<28} {value}" for name, value in _flat("", manifest.figures)),
        *_believed(bundle.report.get("by_predicted_group", {}).get("calibrated", {})),
        f"canary         {_canary(bundle)}",
        f"files          {len(manifest.files)}, all checksums right",
    ]


def _canary(bundle: Bundle) -> str:
    if bundle.canary is None:
        return f"none: `camcal add-canary {bundle.path}` records the answers that a service then compares"
    return f"answers on {len(bundle.canary.top_classes)} test images, which a service compares at start and reload"


def _believed(found: dict[str, Any]) -> Iterator[str]:
    """A line for each group of classes that calibrated predictions name: how sure they are, how many are right."""
    for group, figures in found.items():
        if figures is not None:
            name = f"predicted {group}"
            yield f"  {name:<28} {figures['confidence']:.1%} sure, {figures['accuracy']:.1%} right"


def _flat(prefix: str, figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested figures as lines: `calibrated.ece`, `0.0213`."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)
