"""One epoch of camcal against the usual loop, on this machine, in one run: `make bench-training`.

The usual loop is what most published code for CIFAR-LT does: a DataLoader with worker processes, transforms of one
PIL image at a time, fp32. Both train the same network with the same augmentation (crop, flip, AutoAugment, Cutout) on
as many images as CIFAR-10-LT has at imbalance 100, cut from scikit-learn's two sample photographs. The contenders take
turns, and the medians of their epochs count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from camcal.models.classifier import LongTailClassifier
from camcal.training.checkpoints import build_network
from camcal.training.data.dataset import Dataset, LabelledImages, long_tail_counts
from camcal.training.data.operations import FILL
from camcal.training.data.sources import preprocessing_of
from camcal.training.fitting.training import Training, compiled
from camcal.training.provenance import COMMIT, hardware
from camcal.training.recipe import Recipe, parse_recipe
from camcal.training.run import Run, RunFolder

SIZE = 32
IMAGES = 12_406
"""Of CIFAR-10-LT at imbalance 100."""
TARGET = 2.5

LOOPS = {
    "camcal_fp32": ("camcal, fp32", ["fit.precision=fp32"]),
    "camcal": ("camcal, bf16 (its default)", []),
    "camcal_compiled": ("camcal, `fit.compile=true`", ["fit.compile=true"]),
    "camcal_camc": ("camcal, `model.camc=prototypes`", ["model.camc=prototypes"]),
}
"""camcal's contenders: what to call them, and what they change in the recipe."""


def recipe(*overrides: str) -> Recipe:
    """ResNet-32 with the augmentation of MARC and BALMS."""
    raw = {
        "name": "bench",
        "data": {"source": "digits"},
        "augment": {"flip": True, "shift": 4, "policy": "autoaugment-cifar10", "erase": 0.5},
        "fit": {"epochs": 200},
    }
    return parse_recipe(raw, "bench", overrides)


def photographs(images: int) -> LabelledImages:
    """At most that many 32×32 crops at random places, in ten classes of CIFAR-10-LT's sizes."""
    random = np.random.default_rng(0)
    sources = load_sample_images().images
    counts = long_tail_counts(5000, 10, 100)
    labels = random.permutation(np.repeat(np.arange(10), counts))[:images]
    pixels = np.empty((len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    for i in range(len(labels)):
        source = sources[i % len(sources)]
        top, left = random.integers(source.shape[0] - SIZE), random.integers(source.shape[1] - SIZE)
        pixels[i] = source[top : top + SIZE, left : left + SIZE]
    return LabelledImages(images=torch.from_numpy(pixels), labels=torch.from_numpy(labels))


def cutout(image_CHW: Tensor) -> Tensor:
    """A grey square of 16 pixels around a random centre, as the usual code does it for one normalised image."""
    row, column = np.random.randint(SIZE, size=2)
    image_CHW[:, max(0, row - 8) : row + 8, max(0, column - 8) : column + 8] = 0
    return image_CHW


class UsualDataset(TorchDataset[tuple[Tensor, int]]):
    """One image at a time through PIL, as torchvision's CIFAR10 does it."""

    def __init__(self, part: LabelledImages, settings: Recipe) -> None:
        self.pixels: NDArray[np.uint8] = part.images.numpy()
        self.labels: list[int] = part.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[FILL] * 3),
                transforms.ToTensor(),
                transforms.Normalize(settings.data.mean, settings.data.std),
                cutout,
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Plain(nn.Module):
    """The same network for images that are normalised already."""

    def __init__(self, network: LongTailClassifier) -> None:
        super().__init__()
        self.trunk, self.head = network.trunk, network.head

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images_BCHW).mean(dim=(2, 3)))
        return logits


def usual_loop(part: LabelledImages, workers: int, device: torch.device) -> Callable[[int], None]:
    """The usual epoch, ready to be run; its workers stay alive between epochs."""
    settings = recipe("fit.precision=fp32")
    network = Plain(build_network(settings, 10)).to(device)
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = DataLoader(
        UsualDataset(part, settings),
        batch_size=settings.fit.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def epoch(number: int) -> None:
        network.train()
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        assert np.isfinite(total)

    return epoch


def camcal_loop(part: LabelledImages, settings: Recipe, device: torch.device) -> Callable[[int], None]:
    """camcal's own epoch, ready to be run."""
    names = [str(k) for k in range(10)]
    data = Dataset(
        classes=names, preprocessing=preprocessing_of(settings.data), train=part.to(device), holdout=part, test=part
    )
    # Nothing is written: an epoch is all that is asked for.
    run = Run(recipe=settings, folder=RunFolder(Path("nowhere")), console=Console(), device=device, given=data)
    training = Training(run, build_network(settings, 10))
    if settings.fit.compile:
        training.model = compiled(training.network, device)

    def epoch(number: int) -> None:
        total = torch.zeros((), device=device)
        for loss, _, _ in training.epoch(number):
            total += loss
        assert np.isfinite(total.item())

    return epoch


def timed(epoch: Callable[[int], None], number: int, device: torch.device) -> float:
    """Seconds that an epoch takes."""
    began = time.perf_counter()
    epoch(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(images: int, repeats: int, workers: int) -> dict[str, Any]:
    """All contenders in turn, `repeats` times, after an epoch each that starts workers, compiles and warms up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = photographs(images)

    runs = {"usual": usual_loop(part, workers, device)}
    runs |= {name: camcal_loop(part, recipe(*overrides), device) for name, (_, overrides) in LOOPS.items()}
    for epoch in runs.values():
        epoch(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        for name, epoch in runs.items():
            seconds[name].append(round(timed(epoch, number, device), 3))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "images": len(part),
        "batch_size": recipe().fit.batch_size,
        "backbone": "resnet32",
        "workers": workers,
        "epoch_s": seconds,
        "images_per_s": {name: round(len(part) / median, 1) for name, median in medians.items()},
        "ratio": {name: round(medians["usual"] / median, 2) for name, median in medians.items()},
        "hardware": hardware(device),
        "commit": COMMIT,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    fewer = result["images"] != IMAGES
    command = "make bench-training" + f' ARGS="--images {result["images"]}"' * fewer
    lines = [
        "# Training speed",
        "",
        f"One epoch of ResNet-32 over {result['images']:,} images of 32×32 pixels, batch {result['batch_size']},",
        f"with crop, flip, AutoAugment and Cutout, on {result['hardware']}.",
        f"Medians of {len(result['epoch_s']['usual'])} epochs each, in turns. The usual loop has {result['workers']} "
        f"worker processes. Written by `{command}`{f' at {commit}' if (commit := result.get('commit')) else ''}.",
        "",
        "| loop | seconds per epoch | images per second | against the usual loop |",
        "|---|---:|---:|---:|",
    ]
    titles = {"usual": "the usual loop: DataLoader, PIL, fp32"} | {name: title for name, (title, _) in LOOPS.items()}
    for name, title in titles.items():
        median = statistics.median(result["epoch_s"][name])
        lines.append(f"| {title} | {median:.1f} | {result['images_per_s'][name]:,.0f} | {result['ratio'][name]:.2f}× |")
    cost = statistics.median(
        slow / fast - 1
        for slow, fast in zip(result["epoch_s"]["camcal_camc"], result["epoch_s"]["camcal"], strict=True)
    )
    lines += ["", f"CAMC changes the time of an epoch by {cost:+.0%}, in the median of the pairs."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--images", type=int, default=IMAGES, help=f"how many [{IMAGES}, as CIFAR-10-LT at imbalance 100]"
    )
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each loop")
    parser.add_argument("--workers", type=int, default=cores, help="of the usual loop's DataLoader")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for JSON and Markdown")
    arguments = parser.parse_args()
    result = measure(arguments.images, arguments.repeats, arguments.workers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "training-speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "training-speed.md").write_text(markdown(result))
    print(markdown(result))
    if result["ratio"]["camcal"] < TARGET:
        print(f"below the target of {TARGET}×")


if __name__ == "__main__":
    main()
