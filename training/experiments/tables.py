"""Tables of results: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from camcal.training.experiments.results import Row, group_names, methods, settings, spread

WIDE = 92
"""Columns a terminal needs for the error under the training prior, `long-tailed`, as well."""

_INTRODUCTION = """\
# Results

Made by `make results` from the files in [results/](results/); do not edit. How the figures come about is told in
[protocol.md](protocol.md).

All figures are in percent: mean ± standard deviation over the seeds, last epoch, no selection on the test set. *ECE*
is the calibration error on the balanced test as the method leaves it, *calibrated* after a temperature fitted on
held-out training images, *long-tailed* that of the probabilities for the training prior, with a temperature of its own,
on the test weighted to it.

- *+ MARC*: the same training as the row without it, its margins calibrated afterwards, on logits of training images;
  *held-out too*, on those of held-out images as well. *+ logit adjustment*: the logarithm of the class prior taken from
  its logits, and nothing fitted. *lean*: how far either still leans to the common classes, fitted on held-out images
  with the temperature, is taken out as well. All of it comes after the scalar that is selected on held-out images,
  which the plain row's *ECE* does not have.
- *cosine*: the normalised classifier, which all rows of CAMC have too; otherwise it is linear. *CAMC* with *weights*
  takes its evidence from the classifier alone, with *both* from it and prototypes, else from prototypes. What is called
  *no CAMC* and *CAMC, prototypes* in the tables of photographs is *cosine* and *cosine, CAMC* in the others.
- *distilled*: it learned from another network beside the labels. *refit*: trained again on all images, with scalar and
  temperature from before; all else is trained on nine tenths of them.

Each seed links to its file. Any run repeats with one command, its file being the recipe:
`camcal train docs/results/FILE.json --set data.root=PATH --out FOLDER`. Where it was distilled, that trains its teacher
first. Most were trained compiled, which needs a C++ compiler; `--set fit.compile=false` does without. MARC's rate has
had a bound since 97c8c52 ([methods](methods.md#marc-calibratemarc)): with a cosine classifier on CIFAR-10-LT, rows made
before that ([which](protocol.md#again)) come out some tenths of a point apart, and up to two points in the ECE as MARC
leaves it. The commit below a table is the one that calibrated and judged; where another trained, the file says so.
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
        console.print(f"a terminal of {WIDE} columns shows the error under the training prior as well")


def markdown(rows: Sequence[Row]) -> str:
    """The whole of docs/results.md."""
    parts = [_INTRODUCTION]
    if not rows:
        parts.append("No results yet.\n")
    for title, part in settings(rows):
        (method, _, *names), lines = _cells(part)
        table = [[method, "seeds", *names], ["---", "---", *["---:"] * len(names)]]
        for (_, rows_of_method), (name, _, *figures) in zip(methods(part), lines, strict=True):
            table.append(
                [name, " ".join(f"[{row['seed']}](results/{row['file']})" for row in rows_of_method), *figures]
            )
        parts.append(f"## {title}\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table) + "\n")
        parts.append(
            f"Made at {_listed(row['commit'] for row in part)} on {_listed(row['hardware'] for row in part)}.\n"
        )
    return "\n".join(parts)


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
