"""A recipe: everything that decides a run, as TOML on disk and as typed models here."""

from __future__ import annotations

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
        """Where the data section leaves them out, mean, std and interpolation are those of the pretrained weights.

        timm, which knows them, takes seconds to import: it is asked once all keys and values are right by themselves.
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
                f"loss.reweight_from = {self.loss.reweight_from:g} never comes with fit.epochs = {self.fit.epochs}: no "
                "epoch begins after that share of them"
            )
        if self.fit.mode == "frozen":
            self._freezes_well()
        if self.fit.mode == "head-then-all":
            self.head_first()
        if self.data.source == "list" and self.augment.area[1] > 1:
            raise ValueError(
                f"augment.area must be at most 1 with data.source = 'list', where crops are cut from the file, got "
                f"{self.augment.area[1]:g}"
            )
        if self.augment.shift >= self.data.input_size:
            raise ValueError(
                f"augment.shift must be below data.input_size = {self.data.input_size}, or whole images are moved out "
                f"of sight, got {self.augment.shift}"
            )
        if self.calibrate.rescale != "off" and self.model.head != "linear":
            raise ValueError(f"calibrate.rescale = {self.calibrate.rescale!r} is for model.head = 'linear'")
        if self.calibrate.rescale != "off" and self.calibrate.start == "prior":
            raise ValueError("calibrate.start = 'prior' and calibrate.rescale both balance the classes: choose one")
        if not self.calibrate.marc and self.calibrate.start == "identity" and self.calibrate.rescale == "off":
            raise ValueError(
                "calibrate.start = 'identity' with calibrate.marc = false would leave probabilities for the classes' "
                "training frequencies and call them balanced: leave calibrate.start out"
            )
        if self.calibrate.refit and (self.calibrate.marc_on != "train" or self.calibrate.rescale != "off"):
            raise ValueError("calibrate.refit needs calibrate.marc_on = 'train' and calibrate.rescale = 'off'")
        self.teaching()
        return self

    def _freezes_well(self) -> None:
        if self.model.weights is None:
            raise ValueError("a trunk can be frozen with pretrained weights alone, such as model.weights = 'pip'")
        if self.data.source == "list":
            raise ValueError("a frozen trunk needs all images in memory, which data.source = 'list' does not hold")
        if self.distill.weight:
            raise ValueError("behind a frozen trunk nothing learns from a teacher: set distill.weight to 0")
        drawn = self.augment.model_dump(exclude={"flip"})
        plain = AugmentConfig().model_dump()
        if changed := [key for key, value in drawn.items() if key != "fill" and value != plain[key]]:
            raise ValueError(
                f"fit.mode = 'frozen' sees each image as it is and, with augment.flip, mirrored; leave "
                f"augment.{changed[0]} out, or take fit.mode = 'all'"
            )

    def head_first(self) -> Recipe:
        """The recipe of the first part of `fit.mode = "head-then-all"`: what follows the trunk, trained alone."""
        raw = self.model_dump(mode="json", exclude={"augment", "fit"}, exclude_unset=True)
        fit = {"mode": "frozen", "epochs": self.fit.head_epochs, "lr": self.fit.head_lr, "warmup_epochs": 0}
        kept = self.fit.model_dump(include={"batch_size", "momentum", "weight_decay", "precision"})
        return Recipe.model_validate(raw | {"augment": {"flip": self.augment.flip}, "fit": kept | fit})

    def teaching(self) -> list[Recipe]:
        """The recipes of the networks that `distill.set` has trained first; none without.

        Raises:
            RecipeError: if one of its changes is no recipe's, or not a teacher's to have, or two teachers are the same.
        """
        several = self.distill.changes()
        if wrong := [change for changes in several for change in changes if not _OF_A_TEACHER.match(change)]:
            raise RecipeError(
                f"distill.set: {wrong[0]!r} is not section.key=value with a key of augment, model, loss or fit, which "
                'alone a teacher may have otherwise; several are a list, ["fit.epochs=400", "fit.lr=0.05"]'
            )
        # What was not said is left to the other head, loss and so on.
        recipes = []
        for changes in several:
            raw = self.model_dump(mode="json", exclude={"distill", "calibrate"}, exclude_unset=True)
            if self.model.scalar == first_scalar(self.model.head):
                raw.get("model", {}).pop("scalar", None)
            recipes.append(parse_recipe(raw, "distill.set", changes))
        if twice := [i for i, recipe in enumerate(recipes, start=1) if recipe in recipes[: i - 1]]:
            raise RecipeError(f"distill.set: teacher {twice[0]} is one of those before it; let each be another one")
        return recipes

    @property
    def training_seed(self) -> int:
        """Of initial weights, order and augmentation. A student's differ from its teacher's, whose seed it shares."""
        return self.seed + (2**31 if self.distill.weight else 0)

    def shown(self) -> dict[str, Any]:
        """The recipe as JSON for others to read: without the places where data, weights and teacher lie."""
        shown = self.model_dump(mode="json", exclude={"data": {"root"}, "distill": {"teacher"}})
        if self.model.weights is not None:
            shown["model"]["weights"] = Path(self.model.weights).name
        return shown

    def deciding(self) -> dict[str, Any]:
        """What decides a run's figures, as JSON: all but where things lie and whether the network is compiled."""
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
