"""`make bench-heatmaps`: camcal's maps and those of other methods on one network, against boxes that people drew."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from camcal.models.bundle import GROUPS, MANIFEST_FILE
from camcal.models.classifier import LongTailClassifier
from camcal.training import pipeline
from camcal.training.checkpoints import load_network
from camcal.training.data.sources import preprocessing_of
from camcal.training.experiments.sweep import load_table
from camcal.training.provenance import hardware
from camcal.training.recipe import load_recipe
from camcal.training.run import RunFolder
from tests.benchmarks.heatmaps import comparison, forms, gallery, mosaics, placement, report, speed
from tests.benchmarks.heatmaps.boxes import BoxedImages, load_boxes, unpack
from tests.benchmarks.heatmaps.comparison import Draw
from tests.benchmarks.heatmaps.localisation import Ints

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "tiny-imagenet100-lt"
ARCHIVE = ROOT.parent / "shared" / "data" / "tiny_imagenet100_lt_boxes.tar.xz"
SEED = 0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def trained(data: Path, out: Path, overrides: list[str]) -> RunFolder:
    """The finished run of the recipe in `out`, trained first where that is still to be done."""
    run = RunFolder(out)
    if not (run.bundle / MANIFEST_FILE).is_file():
        pipeline.train(load_recipe(RECIPE, [f"data.root={data}", *overrides]), run, Console())
    return run


def probes(data: BoxedImages, per_group: int) -> Ints:
    """The first images of each group."""
    parts = [index[:per_group] for group, index in data.positions().items() if group != "all"]
    return np.concatenate(parts)


def measure(
    run: RunFolder,
    with_camc: RunFolder | None,
    boxes: Path,
    peers: Mapping[str, Draw],
    *,
    per_group: int,
    perturbed: int,
    mosaic: int,
    rounds: int,
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        run: of the network to explain.
        with_camc: the same recipe's run with CAMC.
        boxes: the folder with photographs and boxes.
        peers: other methods on the network of `run`.
        per_group: how many photographs of each group; 0 for all.
        perturbed: for how many of them to compute ROAD, insertion and deletion; 0 for none.
        mosaic: how many pictures of four of them; 0 for none.
        rounds: of the measurement of speed; 0 for none.
    """
    network, recipe, meta = load_network(run.network)
    rule = preprocessing_of(recipe.data)
    data = load_boxes(boxes, meta["classes"], meta["train_counts"], rule, per_group, SEED)
    say(f"{len(data.labels)} photographs")
    other = None if with_camc is None else load_network(with_camc.network)[0]
    found = comparison.compare(network, other, data, peers, probes(data, perturbed), say)
    return {
        "setup": {
            "images": {group: len(index) for group, index in data.positions().items()},
            "probes": len(found.probes),
            "seed": SEED,
            "backbone": recipe.model.backbone,
            "input_size": rule.input_size,
            "grid": list(network.features(torch.zeros(1, rule.input_size, rule.input_size, 3)).shape[2:]),
            "recipe": recipe.name,
            "epochs": meta["epoch"],
            "hardware": hardware(torch.device("cpu")),
            "load_before": round(os.getloadavg()[0], 2),
            "grad_cam": version("grad-cam"),
        },
        "accuracy": comparison.accuracy(found),
        "order_changed": found.order_changed,
        "localisation": comparison.localise(found),
        "leads": comparison.leads(found),
        "faithfulness": comparison.bear(network, found, say) if perturbed else {},
        "mosaics": in_mosaics(network, data, peers, mosaic) if mosaic else {},
        "speed": timed(run, network, data, peers, rounds) if rounds else {},
    }


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def in_mosaics(network: LongTailClassifier, data: BoxedImages, peers: Mapping[str, Draw], count: int) -> dict[str, Any]:
    """The grid pointing game, without Score-CAM: four times the pixels and classes would take it hours."""
    say("drawing mosaics")
    quick = {name: draw for name, draw in peers.items() if name != "scorecam"}
    return mosaics.compare(network, data, quick, count, SEED)


def timed(
    run: RunFolder, network: LongTailClassifier, data: BoxedImages, peers: Mapping[str, Draw], rounds: int
) -> dict[str, Any]:
    """The speed of each method, on photographs of all groups."""
    int8 = run.path / "bundle-int8"
    if not (int8 / MANIFEST_FILE).is_file():
        pipeline.export_run(pipeline.open_run(run, Console(stderr=True)), int8, "int8")
    contenders: dict[str, speed.Contender] = {
        speed.OURS: speed.served(run.bundle),
        "camcal_int8": speed.served(int8),
        "camcal_torch": speed.in_torch(network),
        "forward": speed.forward(network),
    }
    contenders |= {name: speed.peer(draw) for name, draw in peers.items()}
    say("measuring speed")
    images = data.images[np.random.default_rng(SEED).permutation(len(data.images))]
    # Neither the network alone nor EigenCAM has more to do for more classes, and Score-CAM would take minutes.
    same = ("forward", "eigencam", "scorecam")
    by_class = {name: contender for name, contender in contenders.items() if name not in same}
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "methods": speed.measure(contenders, images, rounds),
        "five_classes": speed.measure(by_class, images, rounds, classes=5),
    }


@app.command()
def table(
    archive: Annotated[Path, typer.Option(help="Photographs and boxes; packed, or the folder.")] = ARCHIVE,
    runs: Annotated[Path, typer.Option(help="Folder of the two trained networks; trains them where missing.")] = ROOT
    / "runs",
    work: Annotated[Path, typer.Option(help="Folder to unpack into.")] = ROOT / ".venv-bench",
    per_group: Annotated[int, typer.Option(help="Photographs of each group; 0: all.")] = 500,
    perturbed: Annotated[int, typer.Option(help="Of these, for ROAD, insertion and deletion; 0: none.")] = 50,
    mosaic: Annotated[int, typer.Option(help="Pictures of four photographs; 0: none.")] = 100,
    rounds: Annotated[int, typer.Option(help="Of the measurement of speed; 0: none.")] = 50,
    methods: Annotated[str, typer.Option(help="Peers to draw; empty for none.")] = ",".join(report.PEERS),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for heatmaps.json and heatmaps.md.")] = ROOT / "docs" / "benchmarks",
) -> None:
    """Train, measure, and write heatmaps.json and heatmaps.md."""
    from tests.benchmarks.heatmaps.peers import Peer  # needs pytorch-grad-cam

    boxes = archive if archive.is_dir() else unpack(archive, work)
    overrides = set_ or []
    run = trained(boxes, runs / RECIPE, overrides)
    with_camc = trained(boxes, runs / f"{RECIPE}-with-camc", [*overrides, "model.camc=prototypes"])
    network, _, _ = load_network(run.network)
    peers = {name: Peer(name, network) for name in methods.split(",") if name}
    result = measure(
        run, with_camc, boxes, peers, per_group=per_group, perturbed=perturbed, mosaic=mosaic, rounds=rounds
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "heatmaps.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "heatmaps.md").write_text(report.markdown(result))
    say(f"written to {out}")


@app.command("gallery")
def draw_gallery(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, whose test part is shown.")],
    each: Annotated[int, typer.Option(help="Photographs from each group.")] = 4,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = ROOT / "docs/images/heatmap-gallery.jpg",
) -> None:
    """Draw image, plain map, calibrated map and Grad-CAM of photographs from each group, chosen by lot."""
    from tests.benchmarks.heatmaps.peers import Peer

    network, _, meta = load_network(RunFolder(run).network)
    test = pipeline.open_run(RunFolder(run), Console(stderr=True)).data.test
    chosen = gallery.choose(test.labels.numpy(), meta["train_counts"], each, SEED)
    images, labels = test.subset(chosen).images.numpy(), test.labels.numpy()[chosen]
    gallery.draw(network, images, labels, meta["classes"], Peer("gradcam", network)).save(out, quality=85)
    say(f"written to {out}: {each} of each of {', '.join(GROUPS)}")


@app.command("placement")
def check_placement(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, whose test part is looked at.")],
    images: Annotated[int, typer.Option(help="How many photographs.")] = 256,
) -> None:
    """Print the run's map_shift beside what gradients say of it, across the image and down it."""
    network, _, _ = load_network(RunFolder(run).network)
    test = pipeline.open_run(RunFolder(run), Console(stderr=True)).data.test
    chosen = np.random.default_rng(SEED).permutation(len(test))[:images]
    lean = placement.lean(network, test.subset(chosen).images.numpy())
    mean, error = lean.mean(axis=0), lean.std(axis=0, ddof=1) / len(lean) ** 0.5
    print(f"map_shift {network.map_shift:.2f}; by the gradients of {len(lean)} photographs, with standard errors:")
    print(f"{mean[0]:.3f} ± {error[0]:.3f} across, {mean[1]:.3f} ± {error[1]:.3f} down")


@app.command("small-objects")
def write_small_objects(
    folder: Annotated[Path, typer.Argument(help="Folder with photographs and boxes.csv.")],
) -> None:
    """Write small-objects/split.csv in the folder: photographs whose object covers less than 30 % of the picture."""
    out = folder / "small-objects" / "split.csv"  # away from classes.csv, by which labels would be numbers
    out.parent.mkdir(exist_ok=True)
    classes, train, test = forms.list_small_objects(folder, out)
    say(f"written to {out}: {classes} classes, {train} images to train on and {test} to test")


@app.command("forms")
def compare_forms(
    table_file: Annotated[Path, typer.Argument(metavar="TABLE", help="The table's TOML file.")],
    out: Annotated[Path, typer.Argument(help="The folder that camcal bench-table wrote.")],
    boxes: Annotated[Path, typer.Option(help="Folder with photographs and boxes.csv.")],
    data: Annotated[list[str] | None, typer.Option(help="As for camcal bench-table.")] = None,
    per_group: Annotated[int, typer.Option(help="Photographs of each group; 0: all.")] = 0,
) -> None:
    """Print how well the heatmaps of a table's finished runs find the object, by method."""
    print(forms.table(load_table(table_file, data or []), out, boxes, per_group, SEED))


if __name__ == "__main__":
    app()
