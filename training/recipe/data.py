"""Section `data`: where images come from, and how they are resized."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from camcal.models.preprocessing import Rgb
from camcal.training.recipe.section import Section

MADE_TAILED = ("digits", "cifar10", "cifar100")
"""The balanced sources, which `data.imbalance` cuts to a long tail; others have the one they come with."""


class DataConfig(Section):
    """Where images come from.

    source: `digits` (scikit-learn's, made long-tailed), `cifar10` or `cifar100` (packed arrays or torchvision's
        folder), `folder` (an image folder), `list` (list files; images are decoded while training).
    root: the file or folder; relative to the current folder. Not used by `digits`.
    imbalance: of the synthetic tail of `digits` and CIFAR, n_max/n_min; not used by the others.
    train_list, test_list: for `list`, the files with `relative/path label` a line, relative to root as the paths are.
    split_file: for `folder`, a CSV with the columns path, split and label, relative to root.
    test_fraction: for a `folder` without a test part, the share of each class that is put aside as one.
    holdout_fraction: the share of each training class that fits scalar and temperature, and is not trained on.
    fit, resize, input_size, mean, std, interpolation: see `Preprocessing`; the last three are
        those that pretrained weights expect, where none are given.
    """

    source: Literal["digits", "cifar10", "cifar100", "folder", "list"]
    root: Path | None = None
    imbalance: float = Field(default=100.0, ge=1)
    split_file: str | None = None
    train_list: str | None = None
    test_list: str | None = None
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    holdout_fraction: float = Field(default=0.1, gt=0, lt=1)
    fit: Literal["crop", "stretch"] = "crop"
    resize: int = Field(default=32, ge=8, le=1024)
    input_size: int = Field(default=32, ge=8, le=1024)
    mean: Rgb = (0.485, 0.456, 0.406)
    std: Rgb = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

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
                f"input_size is cut from an image brought to resize and must be at most that: got {self.input_size} "
                f"and {self.resize}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if min(self.mean) < 0 or max(*self.mean, *self.std) > 1:
            found = f"{list(self.mean)} and {list(self.std)}"
            raise ValueError(f"mean and std are of values from 0 to 1, as 0.485 and 0.229: got {found}")
        return self
