"""A recipe: everything that decides a run, as TOML on disk and as typed models here."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.preprocessing import Rgb

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read, or a key or value in it that is not accepted."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where images come from.

    source: `digits` (scikit-learn's, made long-tailed), `cifar10` or `cifar100` (packed arrays or torchvision's
        folder), `folder` (an image folder).
    root: the file or folder; relative to the current folder. Not used by `digits`.
    imbalance: of the synthetic tail of `digits` and CIFAR, n_max/n_min; not used by `folder`.
    split_file: for `folder`, a CSV with the columns path, split and label, relative to root.
    test_fraction: for a `folder` without a test part, the share of each class that is put aside as one.
    holdout_fraction: the share of each training class that fits scalar and temperature, and is not trained on.
    fit, resize, input_size, mean, std: see `models.preprocessing.Preprocessing`.
    """

    source: Literal["digits", "cifar10", "cifar100", "folder"]
    root: Path | None = None
    imbalance: float = Field(default=100.0, ge=1)
    split_file: str | None = None
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    holdout_fraction: float = Field(default=0.1, gt=0, lt=1)
    fit: Literal["crop", "stretch"] = "crop"
    resize: int = Field(default=32, ge=8, le=1024)
    input_size: int = Field(default=32, ge=8, le=1024)
    mean: Rgb = (0.485, 0.456, 0.406)
    std: Rgb = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _root_given(self) -> DataConfig:
        if self.source != "digits" and self.root is None:
            raise ValueError(f"source {self.source!r} needs data.root: pass --set data.root=PATH")
        return self


class AugmentConfig(_Section):
    """Random changes to training images; the defaults change nothing.

    flip: mirror half of them.
    shift: move by up to this many pixels each way (pad and crop).
    area: range of the share of the image that is kept; aspect: range of its width to height ratio.
    rotate: up to this many degrees either way.
    fill: what is shown outside the image: `zero`, `mirror`, or `random` (mirror or a random plain colour, per image).
    erase: side of a square that is blanked, as a share of the image's (Cutout, arXiv 1708.04552).
    colour: strength of changes to brightness, contrast and saturation.
    """

    flip: bool = False
    shift: int = Field(default=0, ge=0)
    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    rotate: float = Field(default=0.0, ge=0, le=180)
    fill: Literal["zero", "mirror", "random"] = "zero"
    erase: float = Field(default=0.0, ge=0, lt=1)
    colour: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self


class ModelConfig(_Section):
    """The network; see `models.classifier.LongTailClassifier`."""

    backbone: str = "resnet32"
    weights: str | None = None
    head: Literal["cosine", "linear"] = "cosine"
    scalar: float = Field(default=16.0, gt=0)
    learn_scalar: bool = True
    camc: Literal["off", "weights", "prototypes"] = "off"


class FitConfig(_Section):
    """The optimisation: SGD with Nesterov momentum, a linear warm-up, then a cosine to zero.

    precision: `bf16` runs the network under autocast; head, maps and loss stay in fp32.
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=0.1, gt=0)
    warmup_epochs: float = Field(default=5.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "bf16"


class CalibrateConfig(_Section):
    """The steps after training; see `training.calibrate`.

    passes: how many augmented passes over the training images MARC's cached logits come from.
    exponent: of the generalised re-weighting, w_k ∝ (n_k/N)^-exponent.
    """

    marc: bool = True
    passes: int = Field(default=4, ge=1)
    exponent: float = Field(default=1.2, ge=0)
    iterations: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=512, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class Recipe(_Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    fit: FitConfig
    calibrate: CalibrateConfig = CalibrateConfig()


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that ships with camcal, and apply `key=value` overrides.

    Args:
        source: the path of a TOML file or of a result file, or a name such as `digits`.
        overrides: `section.key=value`, the value in TOML's syntax; bare words are taken as strings.

    Raises:
        RecipeError: naming the key, what was found, and what is accepted.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {str(source)!r}: give a TOML file or one of: {shipped}")
    raw = _read(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_recipe(raw, path.name)


def _read(path: Path) -> dict[str, Any]:
    """A recipe as TOML, or the one in a result file (docs/results/*.json), which so can be run again."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)["recipe"] if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} is not valid TOML: {error}") from None
    except (ValueError, KeyError, TypeError):
        raw = None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name} is not a result file: expected JSON with a recipe in it")
    return raw


def parse_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    """Validate a recipe given as nested dicts; `origin` is named in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(item, origin) for item in error.errors())) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of a recipe given as nested dicts, in place; see `load_recipe`."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {part!r} is not a section")
    table[parts[-1]] = value


def _section(where: Sequence[str | int]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in where:
        field = model.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return model


def _sentence(item: Any, origin: str) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(_section(item["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{origin}: unknown key {where!r}{hint}; accepted here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{origin}: {where!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
    return f"{origin}: {where!r}: {message}{found}"
