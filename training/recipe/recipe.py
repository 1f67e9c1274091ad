"""A recipe: everything that determines a run, as TOML on disk and as typed models here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from camcal.models.backbones import check_backbone, inputs_of
from camcal.training.recipe.augment import AugmentConfig
from camcal.training.recipe.calibrate import CalibrateConfig
from camcal.training.recipe.data import DataConfig
from camcal.training.recipe.distill import DistillConfig
from camcal.training.recipe.fit import FitConfig
from camcal.training.recipe.loss import LossConfig
from camcal.training.recipe.messages import sentence
from camcal.training.recipe.model import ModelConfig, first_scalar
from camcal.training.recipe.overrides import apply_override
from camcal.training.recipe.section import RecipeError, Section

_OF_A_TEACHER = re.compile(r"\s*(augment|model|loss|fit)\.\w+\s*=")


class Recipe(Section):
    """One run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of the model: letters, digits, `.`, `_` and `-`.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Of initial weights, order, augmentation and of the held-out images."
    )
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = LossConfig()
    fit: FitConfig
    distill: DistillConfig = DistillConfig()
    calibrate: CalibrateConfig = CalibrateConfig()

    @model_validator(mode="after")
    def _suits_the_backbone(self) -> Recipe:
        """Mean, std and interpolation default to those of the pretrained weights.

        They are known to timm, which takes seconds to import: it is asked once all keys and values are valid.
        """
        check_backbone(self.model.backbone)
        if self.model.weights is None or not (inputs := inputs_of(self.model.backbone)):
            return self
        data = DataConfig.model_validate(inputs | self.data.model_dump(exclude_unset=True))
        return self.model_copy(update={"data": data})

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.loss.name == "ldam" and self.model.head == "linear":
            raise ValueError("loss.name = 'ldam' needs a normalised head, such as model.head = 'cosine'")
        if self.loss.weights != "none" and self.loss.reweight_from > 1 - 1 / self.fit.epochs:
            raise ValueError(
                f"loss.reweight_from = {self.loss.reweight_from:g} has no effect with fit.epochs = {self.fit.epochs}: "
                "no epoch begins after that share of them"
            )
        if self.fit.mode == "frozen":
            self._freezes_well()
        if self.fit.frozen_stages and self.model.weights is None:
            raise ValueError("stages can only be frozen with pretrained weights, such as model.weights = 'pip'")
        if self.fit.lora and self.model.weights is None:
            raise ValueError("fit.lora adapts pretrained weights: set model.weights, such as model.weights = 'hub'")
        if self.fit.mode == "head-then-all":
            self.head_first()
        if self.data.source == "list" and self.augment.area[1] > 1:
            raise ValueError(
                f"augment.area must be at most 1 with data.source = 'list', where crops are cut from the file, got "
                f"{self.augment.area[1]:g}"
            )
        crops = (self.augment.area, self.augment.aspect) != ((1.0, 1.0), (1.0, 1.0))
        if self.data.source == "list" and self.data.fit == "letterbox" and crops:
            raise ValueError(
                "augment.area and augment.aspect cut from the file with data.source = 'list', which data.fit = "
                "'letterbox' would not fill up: leave them out, or use data.fit = 'crop' or 'stretch'"
            )
        if self.augment.shift >= self.data.input_size:
            raise ValueError(
                f"augment.shift must be below data.input_size = {self.data.input_size}, or images are moved out of "
                f"sight, got {self.augment.shift}"
            )
        if self.calibrate.rescale != "off" and self.model.head != "linear":
            raise ValueError(f"calibrate.rescale = {self.calibrate.rescale!r} is for model.head = 'linear'")
        if self.calibrate.method == "shrunk" and self.calibrate.penalty == 0:
            raise ValueError("calibrate.penalty must be above 0 with calibrate.method = 'shrunk'")
        if self.calibrate.refit and (self.calibrate.marc_on != "train" or self.calibrate.rescale != "off"):
            raise ValueError("calibrate.refit needs calibrate.marc_on = 'train' and calibrate.rescale = 'off'")
        self.teaching()
        return self

    def _freezes_well(self) -> None:
        if self.model.weights is None:
            raise ValueError("a trunk can only be frozen with pretrained weights, such as model.weights = 'pip'")
        if self.data.source == "list":
            raise ValueError("a frozen trunk needs all images in memory, which data.source = 'list' does not load")
        if self.distill.weight:
            raise ValueError("distillation does not work with a frozen trunk: set distill.weight to 0")
        drawn = self.augment.model_dump(exclude={"flip"})
        plain = AugmentConfig().model_dump()
        if changed := [key for key, value in drawn.items() if key != "fill" and value != plain[key]]:
            raise ValueError(
                f"fit.mode = 'frozen' uses each image as it is and, with augment.flip, mirrored: leave "
                f"augment.{changed[0]} out, or use fit.mode = 'all'"
            )

    def for_images(self, count: int) -> Recipe:
        """The same recipe with as many epochs as `fit.least_steps` asks for with so many training images."""
        least = math.ceil(self.fit.least_steps / math.ceil(count / self.fit.batch_size))
        epochs = {key: max(least, getattr(self.fit, key)) for key in ("epochs", "head_epochs")}
        return self.model_copy(update={"fit": self.fit.model_copy(update=epochs)})

    def head_first(self) -> Recipe:
        """The recipe of the first part of `fit.mode = "head-then-all"`: only what follows the trunk is trained."""
        raw = self.model_dump(mode="json", exclude={"augment", "fit", "calibrate"}, exclude_unset=True)
        fit = {"mode": "frozen", "epochs": self.fit.head_epochs, "lr": self.fit.head_lr, "warmup_epochs": 0}
        kept = self.fit.model_dump(include={"batch_size", "optimizer", "momentum", "weight_decay", "precision", "ema"})
        return Recipe.model_validate(raw | {"augment": {"flip": self.augment.flip}, "fit": kept | fit})

    def teaching(self) -> list[Recipe]:
        """The recipes of the teachers that `distill.set` trains; empty without it.

        Raises:
            RecipeError: if a change is not valid or not allowed for a teacher, or two teachers are the same.
        """
        several = self.distill.changes()
        if wrong := [change for changes in several for change in changes if not _OF_A_TEACHER.match(change)]:
            raise RecipeError(
                f"distill.set: {wrong[0]!r} is not section.key=value with a key of augment, model, loss or fit, which "
                'alone may differ for a teacher; several are a list, ["fit.epochs=400", "fit.lr=0.05"]'
            )
        # Unset keys take the defaults of the teacher's own head, loss and so on.
        recipes = []
        for changes in several:
            raw = self.model_dump(mode="json", exclude={"distill", "calibrate"}, exclude_unset=True)
            if self.model.scalar == first_scalar(self.model.head):
                raw.get("model", {}).pop("scalar", None)
            recipes.append(parse_recipe(raw, "distill.set", changes))
        if twice := [i for i, recipe in enumerate(recipes, start=1) if recipe in recipes[: i - 1]]:
            raise RecipeError(f"distill.set: teacher {twice[0]} is the same as one before it: each must differ")
        return recipes

    @property
    def training_seed(self) -> int:
        """Seed of initial weights, order and augmentation; a student's differs from its teacher's."""
        return self.seed + (2**31 if self.distill.weight else 0)

    def shown(self) -> dict[str, Any]:
        """The recipe as JSON without local paths of data, weights and teacher."""
        shown = self.model_dump(mode="json", exclude={"data": {"root"}, "distill": {"teacher"}})
        if self.model.weights is not None:
            shown["model"]["weights"] = Path(self.model.weights).name
        return shown

    def deciding(self) -> dict[str, Any]:
        """The part that determines a run's figures, as JSON: without paths, and whether the network is compiled."""
        return self.model_copy(update={"fit": self.fit.model_copy(update={"compile": False})}).shown()


def parse_recipe(raw: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate a recipe given as nested dicts, which overrides change in place; `origin` is named in errors.

    Raises:
        RecipeError: as `load_recipe` does.
    """
    for override in overrides:
        apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("; ".join(sentence(item, origin, Recipe) for item in error.errors())) from None
