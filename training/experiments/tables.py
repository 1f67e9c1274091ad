"""Tables of results: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

from camcal.training.experiments.results import Row, group_names, methods, settings, spread

WIDE = 92
"""Terminal columns needed for the column `long-tailed`, the error under the training prior."""

_INTRODUCTION = """\
# Results

`make results` writes this page from the files in `docs/results`. [How figures are
made](../explanation/protocol.md) defines every figure.

All figures are in percent: mean ± standard deviation over the seeds, last epoch, no selection on the test set.

- *ECE* is the calibration error on the balanced test as the method leaves it.
- *calibrated* is the error after a temperature fitted on held-out training images.
- *long-tailed* is the error of the probabilities for the training prior, with a temperature of its own, on the test
  weighted to that prior.

The names of the methods:

- *+ MARC*: the training of the row without it, with margins calibrated afterwards on logits of training images.
  *held-out too*: on logits of held-out images as well.
- *+ auto*: the calibration that held-out images chose for each seed ([Calibrations compared](#calibrations-compared)).
- *+ logit adjustment*: the logarithm of the class prior is taken from the logits of the row without it. Nothing is
  fitted.
- *lean*: one more number, fitted on held-out images with the temperature, takes out how far the logits still lean to
  the common classes.
- All of these follow the scalar that is selected on held-out images. The *ECE* of a plain row is without that scalar.
- *cosine*: the normalised classifier, which all rows of CAMC have too. Other rows have a linear one.
- *CAMC*: with *weights* its evidence comes from the classifier, with *both* from classifier and prototypes, otherwise
  from prototypes. *no CAMC* and *CAMC, prototypes* in the tables of photographs are *cosine* and *cosine, CAMC* in the
  others.
- *distilled*: the network learned from another network beside the labels.
- A backbone whose name begins with *timm/* is pretrained on ImageNet and frozen: not to be compared with the others.
- *refit*: the network was trained again on all images, with scalar and temperature from before. All others are trained
  on nine tenths of the images.

Each seed links to its result file, which is a recipe as well. This repeats a run, and trains its teacher first if it
was distilled: `camcal train docs/results/FILE.json --set data.root=PATH --out FOLDER`. Most runs were compiled, which
needs a C++ compiler; add `--set fit.compile=false` to do without. MARC's rate has had a bound since 97c8c52
([MARC](../explanation/methods.md#marc-marc)). With a cosine classifier on CIFAR-10-LT,
[rows made before](../explanation/protocol.md#repeat-the-figures) come out some tenths of a point apart, and up to two
points in the ECE as MARC leaves it. The commit below a table is the one that calibrated and evaluated. Where another
one trained, the result file says so.
"""


def print_results(rows: Sequence[Row], console: Console) -> None:
    """One table for each setting."""
    if not rows:
        console.print("no results yet")
    for title, part in settings(rows):
        wide = console.width >= WIDE
        header, lines = _cells(part)
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for name in header if wide else header[:-1]:
            left = name == "method"
            table.add_column(name, justify="left" if left else "right", no_wrap=not left)
        for line in lines:
            table.add_row(*(line if wide else line[:-1]))
        console.print(table)
        console.print()
    if rows and console.width < WIDE:
        console.print(f"a terminal with {WIDE} columns also shows the error under the training prior")


def markdown(rows: Sequence[Row]) -> str:
    """The whole of docs/benchmarks/results.md."""
    parts = [_INTRODUCTION]
    if not rows:
        parts.append("No results yet.\n")
    for title, part in settings(rows):
        (method, _, *names), lines = _cells(part)
        table = [[method, "seeds", *names], ["---", "---", *["---:"] * len(names)]]
        for (_, rows_of_method), (name, _, *figures) in zip(methods(part), lines, strict=True):
            table.append(
                [name, " ".join(f"[{row['seed']}](../results/{row['file']})" for row in rows_of_method), *figures]
            )
        parts.append(f"## {title}\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table) + "\n")
        parts.append(
            f"Made at {_listed(row['commit'] for row in part)} on {_listed(row['hardware'] for row in part)}.\n"
        )
    return "\n".join([*parts, *_compared(rows)])


_COMPARED = """\
## Calibrations compared

`calibrate.method = "auto"` fits several calibrations, judges each by a loss on held-out images that its fit has not
seen ([the choice](../explanation/methods.md#the-choice-auto)), and serves the best, or one with fewer numbers that is
within a standard error of it.
Here is that choice beside what each gives on the test, which had no part in it: *served*, by how many of the seeds; and
the mean over seeds of all figures. *auto* has those of the calibration that each seed served. *regret* is how much
lower the test NLL would have been with the best calibration of each seed. Accuracies and ECE are in percent.
"""


def _compared(rows: Sequence[Row]) -> list[str]:
    """The section about calibrations, if any run compared some."""
    runs = {row["file"]: row for row in reversed(rows) if row["candidates"]}  # the first row of each file
    if not runs:
        return []
    parts, titled = [_COMPARED], [(title, methods(part)) for title, part in settings(reversed(list(runs.values())))]
    for title, by_method in titled:
        header = [
            "training",
            "calibration",
            "served",
            "loss",
            "held-out NLL",
            "test NLL",
            "regret",
            "top-1",
            "few",
            "ECE",
        ]
        table = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
        for method, part in by_method:
            table += [[method, *line] for line in _choices([row["candidates"] for row in part])]
        parts += [f"### {title}\n", "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"]
    return parts


def _choices(seeds: Sequence[Sequence[Row]]) -> list[list[str]]:
    """A line for `auto`, and one for each calibration that all seeds have compared."""
    best = [min(each["test"]["nll"] for each in candidates) for candidates in seeds]

    def line(name: str, chosen: Sequence[Row], served: str) -> list[str]:
        regret = mean(each["test"]["nll"] - least for each, least in zip(chosen, best, strict=True))
        figures = (spread([each["test"][key] for each in chosen]) for key in ("accuracy", "few", "ece"))
        losses = [mean(each[key] for each in chosen) for key in ("loss", "nll")]
        losses += [mean(each["test"]["nll"] for each in chosen), regret]
        return [name, served, *(f"{value:.4f}" for value in losses), *figures]

    auto = [next(each for each in candidates if each["served"]) for candidates in seeds]
    lines = [line("**auto**", auto, str(len(seeds)))]
    for name in (each["method"] for each in seeds[0]):
        found = [each for candidates in seeds for each in candidates if each["method"] == name]
        if len(found) == len(seeds):
            lines.append(line(name, found, str(sum(each["served"] for each in found))))
    return lines


def _listed(values: Iterable[str | None]) -> str:
    return "; ".join(sorted({str(value or "an unknown commit") for value in values}))


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    kind, names = group_names(rows)
    lines = []
    for method, part in methods(rows):
        line = [method, str(len(part)), spread([row["accuracy"] for row in part])]
        line += [spread([row[kind].get(name) for row in part]) for name in names]
        line += [spread([row[key] for row in part]) for key in ("ece", "ece_calibrated")]
        lines.append([*line, spread([row["train_prior"]["ece"] for row in part])])
    return ["method", "n", "top-1", *names, "ECE", "calibrated", "long-tailed"], lines
