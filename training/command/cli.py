"""The commands of training.

Torch is imported inside the commands: serving does not need it, and --help does not wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from camcal.terminal import exit_on_user_error, fail

if TYPE_CHECKING:
    from camcal.training.run import Run

app = typer.Typer()
console = Console(highlight=False)

_RESUME = "interrupted; rerun the same command to resume after the last finished epoch"
_EXTRA = {"torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "sklearn", "scipy", "jinja2"}

RunArgument = Annotated[Path, typer.Argument(help="The folder of a run, from `camcal train --out`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change one value of the recipe, such as fit.epochs=40; may be repeated. camcal recipe explains the keys.",
    ),
]
Moved = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.root=PATH", help="Where data is now, if it has moved."),
]


@contextmanager
def _spoken_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """End a user's mistake with one sentence and exit code 2, and an interruption with one sentence and 130."""
    try:
        with exit_on_user_error():
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        fail(f"{error.name} is not installed; training needs more than serving: pip install 'camcal[cpu,train]'")
    except RuntimeError as error:
        if (sentence := _explained(error)) is None:
            raise
        fail(sentence)
    except KeyboardInterrupt:
        typer.echo(f"\n{interrupted}", err=True)
        raise typer.Exit(130) from None


def _explained(error: RuntimeError) -> str | None:
    """A sentence for errors of PyTorch or a process pool about memory or a compiler; None for others."""
    kind, first = type(error), str(error).strip().partition("\n")[0]
    if kind.__name__ == "OutOfMemoryError":  # by name: `camcal results` does not need torch
        return f"{first} A smaller fit.batch_size needs less."
    if kind.__module__.startswith(("torch._inductor.", "torch._dynamo.")):
        return (
            f"the network cannot be compiled ({first}). On a CPU this needs a C++ compiler; --set fit.compile=false "
            "trains without one"
        )
    if isinstance(error, BrokenExecutor):
        return "a process died, perhaps out of memory: use fewer with --jobs; finished rows are kept"
    return None


def _opened(folder: Path, overrides: list[str] | None, *sections: str) -> Run:
    """A trained run with overrides of what may still change in its recipe: `data.root` and the sections named."""
    from camcal.training import pipeline
    from camcal.training.recipe import RecipeError
    from camcal.training.run import RunFolder

    accepted = ("data.root=", *(f"{section}." for section in sections))
    if wrong := [o for o in overrides or () if not o.strip().startswith(accepted)]:
        may = " and ".join([*(f"{section}.…" for section in sections), "data.root"])
        raise RecipeError(f"--set {wrong[0]}: only {may} can change after training")
    return pipeline.open_run(RunFolder(folder), console, overrides or ())


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A TOML file, a result file, or the name of a recipe that ships, such as digits.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, report and bundle.")],
    overrides: Overrides = None,
) -> None:
    """Train, calibrate, evaluate and export: from labelled photographs to a bundle.

    Rerun the same command to resume an interrupted run.
    """
    with _spoken_errors(_RESUME):
        from camcal.training.recipe import load_recipe, refuse_idle

        settings = load_recipe(recipe, overrides or ())
        refuse_idle(settings, overrides or ())
        for taught_by, changes in zip(settings.teaching(), settings.distill.changes(), strict=True):
            refuse_idle(taught_by, changes)
        from camcal.training import pipeline
        from camcal.training.run import RunFolder

        if (bundle := pipeline.train(settings, RunFolder(out), console)) is None:
            return
        console.print(f"serve it:  camcal serve --bundle {bundle.path}")


@app.command()
def recipe(
    key: Annotated[
        str, typer.Argument(help="A section, such as loss, or a key, such as loss.gamma; by default all sections.")
    ] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the whole reference as Markdown.")] = False,
) -> None:
    """Explain the keys of a recipe: their values, defaults and meaning."""
    with _spoken_errors():
        from camcal.training.recipe import reference

        width = max(40, min(100, shutil.get_terminal_size().columns))
        typer.echo(reference.markdown() if as_markdown else reference.text(key, width), nl=not as_markdown)


@app.command()
def calibrate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change a value of the section calibrate, such as calibrate.method=lean, or set data.root=PATH if "
            "the data has moved; may be repeated. Other values stay as they were last.",
        ),
    ] = None,
) -> None:
    """Fit scalar, margins and temperature again, optionally with other settings of the section calibrate."""
    with _spoken_errors():
        from camcal.training import pipeline
        from camcal.training.recipe import refuse_idle

        opened = _opened(run, overrides, "calibrate")
        refuse_idle(opened.recipe, overrides or ())
        pipeline.calibrate_run(opened)


@app.command()
def evaluate(run: RunArgument, overrides: Moved = None) -> None:
    """Evaluate a calibrated run on its test part; writes and prints the report."""
    with _spoken_errors():
        from camcal.training import pipeline

        pipeline.evaluate_run(_opened(run, overrides))


@app.command()
def export(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the bundle [bundle or bundle-PRECISION in the run's folder]."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 (GPUs) or int8 (CPUs). Refused if accuracy on held-out images suffers.")
    ] = "fp32",
    overrides: Moved = None,
) -> None:
    """Write the bundle of a calibrated and evaluated run."""
    with _spoken_errors():
        from camcal.training import pipeline
        from camcal.training.export.precision import parse_precision

        chosen, opened = parse_precision(precision), _opened(run, overrides)
        own = opened.folder.bundle if chosen == "fp32" else run / f"bundle-{chosen}"
        pipeline.export_run(opened, out or own, chosen)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    overrides: Moved = None,
) -> None:
    """Evaluate a bundle's graph on the test part of its data, and compare the figures with its report."""
    with _spoken_errors():
        from camcal.models.bundle import Bundle
        from camcal.training.data import load_dataset
        from camcal.training.export import verify as verification

        loaded = Bundle.load(bundle)
        recipe = verification.recipe_of(loaded, overrides or ())
        with console.status("reading images"):
            data = load_dataset(recipe.data, recipe.seed)
        verification.verify(loaded, data, console)
        console.print("accuracy and ECE match the report")


@app.command()
def results(
    folder: Annotated[
        Path | None, typer.Option("--from", help="Folder of result files; docs/results by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/benchmarks/results.md.")] = False,
) -> None:
    """Print the table of all committed results: mean ± standard deviation over seeds, in percent."""
    with _spoken_errors():
        from camcal.training.experiments import tables
        from camcal.training.experiments.results import FOLDER, load_results

        if as_json and as_markdown:
            fail("--json and --markdown exclude each other: choose one")
        rows = load_results(folder or FOLDER)
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
        elif as_markdown:
            typer.echo(tables.markdown(rows), nl=False)
        else:
            tables.print_results(rows, console)


@app.command(name="bench-table")
def bench_table(
    table: Annotated[Path, typer.Argument(help="A TOML file with rows, data sets and seeds.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, one JSON per run; the networks are in its runs/.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=PATH",
            help="Where data is, by source (cifar100=PATH) or by recipe (caltech100=PATH); may be repeated.",
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Only rows whose name contains this.")] = "",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes [1, or up to 8 on a GPU].")] = None,
    overrides: Overrides = None,
) -> None:
    """Train, calibrate and evaluate every row of a table; finished rows are skipped, interrupted ones resume."""
    with _spoken_errors(_RESUME):
        from camcal.training.experiments.sweep import load_table, run_table
        from camcal.training.run import default_device

        wanted = load_table(table, data or (), only, overrides or ())
        gpu = default_device().type == "cuda"
        processes = jobs or (min(8, max(1, (os.cpu_count() or 1) // 2)) if gpu else 1)
        if failed := run_table(wanted, out, processes, console):
            fail(f"{failed} of {len(wanted)} rows failed: rerun the same command to retry them")
