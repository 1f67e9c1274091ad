"""A table of runs: each row of a TOML file, on each data set, with each seed; finished ones are skipped.

One process trains the rows one after another; on a GPU several processes share it. Rerun the same command to resume:
an interrupted row continues after its last finished epoch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from camcal.training import pipeline
from camcal.training.checkpoints import save_json
from camcal.training.data import Dataset, load_dataset
from camcal.training.experiments.results import Row, result_of
from camcal.training.fitting.distill import load_teachers, weights_digest
from camcal.training.recipe import MADE_TAILED, Recipe, RecipeError, load_recipe, parse_recipe, refuse_idle
from camcal.training.run import Run, RunFolder, default_device


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableData(_Strict):
    """A recipe to start from, and what all rows change in it, as `section.key=value`."""

    recipe: str
    set: list[str] = []


class TableRow(_Strict):
    """One method: what it changes in the recipe.

    calibrated: the name after calibration, see `result_of`.
    plain: whether to report the network as trained; false for a row that only calibrates the same training in another
        way, which is then not trained again.
    """

    method: str = Field(min_length=1)
    calibrated: str | None = None
    plain: bool = True
    set: list[str] = []


class TableFile(_Strict):
    """A table: every row, on every data set, with every seed. `set` applies to all of them."""

    seeds: list[int] = Field(min_length=1)
    set: list[str] = []
    data: list[TableData] = Field(min_length=1)
    row: list[TableRow] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row with one seed."""

    name: str
    row: TableRow
    recipe: Recipe

    @property
    def training(self) -> str:
        """The folder name of a training, which is equal for jobs that differ in calibration only."""
        fields = {key: value for key, value in self.recipe.deciding().items() if key not in ("name", "calibrate")}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return f"{self.recipe.name}-s{self.recipe.seed}-{digest[:12]}"


def load_table(path: Path, roots: Sequence[str] = (), only: str = "", overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a table: data set by data set, and within each seed by seed.

    Args:
        roots: where data is, as `SOURCE=PATH`, such as `cifar100=data/cifar100.npz`; or, if several recipes read the
            same kind of source, `RECIPE=PATH`, which takes precedence.
        only: take only jobs whose name contains this.
        overrides: changes to every row, as `section.key=value`, which take precedence over the table.

    Raises:
        RecipeError: if the table or one of its recipes is not valid, or two rows would have the same name or folder.
    """
    table, where = _read(path), _parse_roots(roots)
    drafts = [
        _draft(path.stem, data, row, seed, [*table.set, *data.set, *row.set, *overrides, f"seed={seed}"])
        for data in table.data
        for seed in table.seeds
        for row in table.row
    ]
    names = [draft.name for draft in drafts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"{path.name}: two rows are called {twice[0]}; give each its own method, or calibrated, name")
    jobs = [_with_root(draft, where) for draft in drafts if only in draft.name]
    if not jobs:
        raise RecipeError(f"{path.name} has no row whose name contains {only!r}; the first is {names[0]}")
    for override in overrides:
        _refuse_idle_in_all(jobs, override)
    trained: dict[str, Job] = {}
    for job in jobs:
        first = trained.setdefault(job.training, job)
        if first.recipe.distill.teacher != job.recipe.distill.teacher:
            raise RecipeError(
                f"{path.name}: {first.name} and {job.name} differ only in distill.teacher, and would share a folder: "
                "put them into two tables, each with its own --out"
            )
    return jobs


def _read(path: Path) -> TableFile:
    try:
        return TableFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RecipeError(f"no table at {path}: give a TOML file, such as tests/benchmarks/tables/short.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} is not valid TOML: {error}") from None
    except ValidationError as error:
        places = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise RecipeError("; ".join(f"{path.name}: {where!r}: {what}" for where, what in places)) from None


def _parse_roots(roots: Sequence[str]) -> dict[str, str]:
    pairs = [root.partition("=") for root in roots]
    if wrong := [source + equals for source, equals, path in pairs if not (source and path)]:
        raise RecipeError(f"--data {wrong[0]!r} is not of the form SOURCE=PATH")
    return {source: path for source, _, path in pairs}


def _draft(table: str, data: TableData, row: TableRow, seed: int, overrides: list[str]) -> Job:
    """A job whose data may have no path yet."""
    try:
        recipe = load_recipe(data.recipe, overrides)
    except RecipeError:
        # CIFAR recipes are not valid without a root: use the current folder until the source is known.
        recipe = load_recipe(data.recipe, ["data.root=.", *overrides])
    refuse_idle(recipe, row.set)
    if not row.plain and recipe.calibrate.method == "temperature":
        raise RecipeError(
            f"{table}.toml: {row.method}: plain = false leaves no row of calibrate.method = 'temperature'"
        )
    slug = re.sub(r"[^a-z0-9]+", "-", (row.method if row.plain else row.calibrated or row.method).lower()).strip("-")
    tail = f"-if{recipe.data.imbalance:g}" if recipe.data.source in MADE_TAILED else ""
    return Job(name=f"{recipe.name}{tail}_{slug}_{table}_s{seed}", row=row, recipe=recipe)


def _refuse_idle_in_all(jobs: Sequence[Job], override: str) -> None:
    """Raises RecipeError, as for the first job, if an override decides nothing in any of them."""
    idle = []
    for job in jobs:
        try:
            return refuse_idle(job.recipe, [override])
        except RecipeError as error:
            idle.append(error)
    raise idle[0]


def _with_root(job: Job, roots: dict[str, str]) -> Job:
    source = job.recipe.data.source
    root = roots.get(job.recipe.name, roots.get(source))
    if root is None:
        if job.recipe.data.root == Path("."):
            raise RecipeError(f"{job.name} needs data: pass --data {source}=PATH")
        return job
    data = job.recipe.data.model_copy(update={"root": Path(root)})
    return Job(name=job.name, row=job.row, recipe=job.recipe.model_copy(update={"data": data}))


def run_table(jobs: Sequence[Job], out: Path, processes: int, console: Console) -> int:
    """Run the jobs without a result in `out`, printing a line per finished row. Returns the number of failed rows.

    The result of a job is `out/NAME.json`; its training is in `out/runs/`.
    """
    left = [job for job in jobs if not _finished(job, out)]
    if done := len(jobs) - len(left):
        console.print(f"{done} of {len(jobs)} rows are finished already")
    RunFolder(out).make()
    groups: dict[str, list[Job]] = {}
    for job in left:
        groups.setdefault(job.training, []).append(job)
    failed = 0
    for line, good in _lines(list(groups.values()), out, processes):
        done, failed = done + good, failed + (not good)
        console.print(f"{done}/{len(jobs)}  {line}", soft_wrap=True)
    return failed


def _result_path(job: Job, out: Path) -> Path:
    return out / f"{job.name}.json"


def _finished(job: Job, out: Path) -> bool:
    """Whether the result exists and was made with the recipe and the teachers of the table."""
    try:
        found = json.loads(_result_path(job, out).read_text(encoding="utf-8"))
        found["recipe"]["data"]["root"] = job.recipe.data.root
        recipe, fit = job.recipe, found["recipe"]["fit"]
        if recipe.fit.least_steps:  # which may have raised the epochs
            raised = {key: max(getattr(recipe.fit, key), fit[key]) for key in ("epochs", "head_epochs")}
            recipe = recipe.model_copy(update={"fit": recipe.fit.model_copy(update=raised)})
        if parse_recipe(found["recipe"], job.name).deciding() != recipe.deciding():
            return False
        if job.recipe.distill.teacher is None:
            return True
        wanted = [weights_digest(network) for _, (network, _, _) in load_teachers(job.recipe)]
        return [teacher["weights"] for teacher in found["teachers"]] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lines(groups: list[list[Job]], out: Path, processes: int) -> Iterator[tuple[str, bool]]:
    """A line for each job, and whether it succeeded; in this process, or in several that take a group at a time."""
    if processes == 1:
        for group in groups:
            yield from run_group(group, out)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (processes,)) as pool:
        futures = [pool.submit(run_group, group, out) for group in groups]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(processes: int) -> None:
    """Share the cores, and end when the parent ends, however it does."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def run_group(jobs: Sequence[Job], out: Path) -> list[tuple[str, bool]]:
    """Train once, then calibrate and evaluate for each job; jobs must share their training."""
    lines = []
    for job in jobs:
        began = time.perf_counter()
        try:
            result = _run(job, out)
        except (ValueError, OSError, RuntimeError) as error:  # PyTorch's errors, out of memory too, are RuntimeErrors
            lines.append((f"{job.name}: failed: {error}", False))
            continue
        figures = "; ".join(map(_figures, result["rows"]))
        lines.append((f"{job.name}: {figures}; {time.perf_counter() - began:.0f} s", True))
    return lines


def _figures(row: Row) -> str:
    accuracy, ece, calibrated = (100 * row[key] for key in ("accuracy", "ece", "ece_calibrated"))
    return f"{row['method']} {accuracy:.1f} %, ECE {ece:.1f} → {calibrated:.1f}"


def _run(job: Job, out: Path) -> Row:
    folder = RunFolder(out / "runs" / job.training)
    folder.make()
    with folder.claimed(), (folder.path / "log.txt").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=120)
        console.print(job.name)
        data, device = _load(job.recipe), default_device()
        recipe = job.recipe.for_images(len(data.train))
        run = Run(recipe=recipe, folder=folder, console=console, device=device, given=data)
        pipeline.fit_run(run)
        pipeline.calibrate_run(run)
        report = pipeline.evaluate_run(run)
    result = result_of(report, job.row.method, job.row.calibrated, plain=job.row.plain)
    save_json(_result_path(job, out), result)
    return result


_last: tuple[str, Dataset] | None = None


def _load(recipe: Recipe) -> Dataset:
    """The data of a recipe, cached since the next job mostly needs the same."""
    global _last
    key = f"{recipe.seed} {recipe.data.model_dump_json()}"
    if _last is None or _last[0] != key:
        _last = key, load_dataset(recipe.data, recipe.seed)
    return _last[1]
