"""Section `data`: where images come from, and how they become the network's input."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from camcal.models.preprocessing import Rgb
from camcal.training.recipe.section import Section

MADE_TAILED = ("digits", "cifar10", "cifar100")
"""The balanced sources, which `data.imbalance` cuts to a long tail; others have the one they come with."""


class DataConfig(Section):
    """Where images come from, and how they become the network's input."""

    source: Literal["digits", "cifar10", "cifar100", "folder", "list"] = Field(
        description="The kind of data. `digits`: scikit-learn's handwritten digits, made long-tailed. `cifar10`, "
        "`cifar100`: packed arrays or torchvision's folder, made long-tailed. `folder`: an image folder. `list`: list "
        "files; images are decoded while training."
    )
    root: Path | None = Field(
        default=None, description="The file or folder, relative to the current folder. `digits` needs none."
    )
    imbalance: float = Field(
        default=100.0,
        ge=1,
        description="The ratio of the largest class to the smallest, n_max/n_min, for data that is made long-tailed.",
    )
    split_file: str | None = Field(
        default=None,
        description="A CSV file, relative to the root, with the columns `path`, `split` (train or test) and `label`.",
    )
    train_list: str | None = Field(
        default=None, description="The list of training images, relative to the root: `relative/path label` per line."
    )
    test_list: str | None = Field(default=None, description="The list of test images, in the same format.")
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="The share of each class set aside as test part, if a folder has none."
    )
    holdout_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="The share of each training class that is held out to fit scalar and temperature.",
    )
    fit: Literal["crop", "stretch", "letterbox"] = Field(
        default="crop",
        description="How images become square. `crop`: the short side is resized to `resize`, and the centre kept. "
        "`stretch`: both sides are resized, so that nothing is lost. `letterbox`: the long side is, and the rest "
        "filled with the mean colour, so that nothing is lost or distorted.",
    )
    resize: int = Field(default=32, ge=8, le=1024, description="The side that images are resized to, in pixels.")
    input_size: int = Field(
        default=32, ge=8, le=1024, description="The side of the central square that the network sees, in pixels."
    )
    mean: Rgb = Field(
        default=(0.485, 0.456, 0.406),
        description="Mean of each channel, for values from 0 to 1; by default what pretrained weights expect.",
    )
    std: Rgb = Field(default=(0.229, 0.224, 0.225), description="Standard deviation of each channel, likewise.")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="How images are resized; by default what pretrained weights expect."
    )

    @model_validator(mode="after")
    def _root_given(self) -> DataConfig:
        if self.source != "digits" and self.root is None:
            raise ValueError(f"source {self.source!r} needs data.root: pass --set data.root=PATH")
        if self.source == "list" and not (self.train_list and self.test_list):
            raise ValueError("source 'list' needs data.train_list and data.test_list")
        return self

    @model_validator(mode="after")
    def _preprocessing_fits(self) -> DataConfig:
        if self.input_size > self.resize:
            raise ValueError(
                f"input_size is cut from an image of size resize, and must be at most that: got {self.input_size} "
                f"and {self.resize}"
            )
        if self.fit == "letterbox" and self.input_size < self.resize:
            raise ValueError(
                "fit = 'letterbox' shows whole images, so input_size must be the same as resize: got "
                f"{self.input_size} and {self.resize}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if min(self.mean) < 0 or max(*self.mean, *self.std) > 1:
            found = f"{list(self.mean)} and {list(self.std)}"
            raise ValueError(f"mean and std are for values from 0 to 1, such as 0.485 and 0.229: got {found}")
        return self
