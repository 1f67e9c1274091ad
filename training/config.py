"""A recipe: everything that decides a run, as TOML on disk and as typed models here."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from camcal.models.preprocessing import Rgb

RECIPES = Path(__file__).parent / "recipes"

MADE_TAILED = ("digits", "cifar10", "cifar100")
"""The balanced sources, which `data.imbalance` cuts to a long tail; others have the one they come with."""


class RecipeError(ValueError):
    """A recipe that cannot be read, or a key or value in it that is not accepted."""


Policy = Literal["none", "autoaugment-cifar10", "autoaugment-imagenet", "trivialaugment"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_left_out(cls, found: object) -> object:
        """TOML has no null: `none` takes back what another table says, where a key may be left out."""
        if not isinstance(found, dict):
            return found
        optional = {key for key, field in cls.model_fields.items() if field.default is None}
        return {key: value for key, value in found.items() if value != "none" or key not in optional}


class DataConfig(_Section):
    """Where images come from.

    source: `digits` (scikit-learn's, made long-tailed), `cifar10` or `cifar100` (packed arrays or torchvision's
        folder), `folder` (an image folder), `list` (list files; images are decoded while training).
    root: the file or folder; relative to the current folder. Not used by `digits`.
    imbalance: of the synthetic tail of `digits` and CIFAR, n_max/n_min; not used by the others.
    train_list, test_list: for `list`, the files with `relative/path label` a line, relative to root as the paths are.
    split_file: for `folder`, a CSV with the columns path, split and label, relative to root.
    test_fraction: for a `folder` without a test part, the share of each class that is put aside as one.
    holdout_fraction: the share of each training class that fits scalar and temperature, and is not trained on.
    fit, resize, input_size, mean, std, interpolation: see `models.preprocessing.Preprocessing`; the last three are
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


class AugmentConfig(_Section):
    """Random changes to training images; the defaults change nothing.

    flip: mirror half of them.
    shift: move by up to this many pixels each way (pad and crop).
    area: range of the share of the image that is kept; aspect: range of its width to height ratio. Where images are
        decoded as they are needed (`list`) the part lies within the image; otherwise a wide or high one of nearly the
        whole image goes beyond it, and `fill` shows there.
    rotate: up to this many degrees either way.
    fill: what is shown outside the image: `zero`, `mirror`, or `random` (mirror or a random plain colour, per image).
    policy: a published policy of operations on grey levels and geometry; see `camcal.training.data.policies`.
    erase: side of a square that is blanked, as a share of the image's (Cutout, arXiv 1708.04552).
    colour: strength of changes to brightness, contrast and saturation.
    mixup, cutmix: parameter of the Beta distribution that says how much of another image is mixed in, 0 for none; with
        both, each batch takes one of the two. See `camcal.training.data.mix`.
    """

    flip: bool = False
    shift: int = Field(default=0, ge=0)
    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    rotate: float = Field(default=0.0, ge=0, le=180)
    fill: Literal["zero", "mirror", "random"] = "zero"
    policy: Policy = "none"
    erase: float = Field(default=0.0, ge=0, lt=1)
    colour: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range [low, high] with 0 < low <= high, got [{low}, {high}]")
        return self


def _first_scalar(head: str) -> float:
    """s of a normalised head where none is given."""
    return 1.0 if head == "weight" else 16.0


class ModelConfig(_Section):
    """The network; see `camcal.models.classifier.LongTailClassifier`.

    backbone: one of `camcal.models.backbones.BACKBONES`, or `timm/NAME` for any network of timm's.
    weights: to start from. For timm's networks `pip`, from an installed package of weights; `hub`, from the Hugging
        Face hub; or a `.safetensors` or `.pth` file. For torchvision's its name of them, such as `IMAGENET1K_V1`.
    neck: channels of a 1×1 convolution with batch normalisation and ReLU behind the trunk, 0 for none; or `last`, the
        one in which an EfficientNet of timm's ends, which then is trained where the trunk is frozen.
    head: `linear`, or a normalised one: `weight`, `cosine`, `cosnorm`, `causal`; see `camcal.models.normalized`.
    scalar: s of a normalised head, at first or, without learn_scalar, for good; 16, or 1 for `weight`.
    camc: where CAMC takes its evidence from, or `taught`, its second form; camc_attention, camc_top: see `models.camc`.
    reslt: the form of ResLT's branches; see `camcal.models.reslt`.
    """

    backbone: str = "resnet32"
    weights: str | None = None
    neck: Annotated[int, Field(ge=0, le=8192)] | Literal["last"] = 0
    head: Literal["linear", "weight", "cosine", "cosnorm", "causal"] = "cosine"
    scalar: float = Field(default=16.0, gt=0)
    learn_scalar: bool = True
    camc: Literal["off", "weights", "prototypes", "both", "taught"] = "off"
    camc_attention: Literal["sigmoid", "softmax"] = "sigmoid"
    camc_top: int = Field(default=0, ge=0)
    reslt: Literal["off", "cifar", "large"] = "off"

    @model_validator(mode="before")
    @classmethod
    def _scalar_of_head(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("head") == "weight":
            return {"scalar": _first_scalar("weight")} | raw
        return raw

    @model_validator(mode="after")
    def _known_backbone(self) -> ModelConfig:
        from camcal.models.backbones import check_backbone  # needs torch, which `camcal results` does without

        check_backbone(self.backbone)
        return self


class LossConfig(_Section):
    """The training loss; see `camcal.training.losses` for the formulas. n_k are the counts of the images trained on.

    name: what is computed of an image: `cross_entropy`; `focal`, with gamma; `ldam`, with the largest margin `margin`,
        for normalised heads; `balanced_softmax`; `logit_adjustment`, with the strength tau.
    weights: of a class: `none`; `grw` ∝ n^-exponent; `class_balanced` ∝ (1-β)/(1-β^n) with β = effective_beta.
    reweight_from: share of the epochs after which the weights apply; 0.8 is LDAM-DRW's 160 of 200.
    smoothing: label smoothing; with smoothing_tail, that of the commonest class, which falls to it for the rarest.
    branch_beta: with ResLT, the share of the branches' own losses; the rest is the loss of their sum.
    branch_ranks: with ResLT, the ranks (0 is the commonest class) from which on a class is medium, and rare; by default
        35 % and 70 % of the classes.
    """

    name: Literal["cross_entropy", "focal", "ldam", "balanced_softmax", "logit_adjustment"] = "cross_entropy"
    weights: Literal["none", "grw", "class_balanced"] = "none"
    reweight_from: float = Field(default=0.0, ge=0, lt=1)
    exponent: float = Field(default=1.2, ge=0, le=10)
    effective_beta: float = Field(default=0.9999, ge=0, lt=1)
    gamma: float = Field(default=2.0, ge=0)
    margin: float = Field(default=0.5, gt=0)
    tau: float = Field(default=1.0, ge=0, le=10)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    smoothing_tail: float | None = Field(default=None, ge=0, lt=1)
    branch_beta: float = Field(default=0.995, ge=0, le=1)
    branch_ranks: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> LossConfig:
        if self.smoothing_tail is not None and self.smoothing_tail > self.smoothing:
            raise ValueError(
                f"smoothing_tail must be at most smoothing, which the commonest class has: got {self.smoothing_tail:g} "
                f"and {self.smoothing:g}"
            )
        if self.branch_ranks is not None and not 0 <= self.branch_ranks[0] <= self.branch_ranks[1]:
            raise ValueError(f"branch_ranks must be two ranks in order, got {list(self.branch_ranks)}")
        return self


class FitConfig(_Section):
    """The optimisation: SGD with Nesterov momentum, a linear warm-up, then a cosine to zero.

    mode: `all` trains the whole network. `frozen` keeps the trunk as its pretrained weights have it and trains what
        follows, on maps of the images as they are and, with augment.flip, mirrored: they are computed once and kept,
        see `camcal.training.features`. `head-then-all` does the one for head_epochs, at head_lr, and then the other.
    trunk_lr: the share of the learning rate at which the trunk learns.
    milestones: instead of the cosine, the epochs from which on the rate is a tenth of what it was before.
    batch_size: of all processes together.
    sampler: how often a class is seen; see `camcal.training.samplers`.
    precision: `bf16` and `fp16` run the network under autocast; head, maps and loss stay in fp32. `fp16` is for GPUs
        without bf16; its gradients are scaled, see `camcal.training.descent`.
    compile: compile the network first, which takes about a minute; on a GPU it then runs as CUDA graphs. It decides
        the speed alone: a run may go on with or without it.
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=0.1, gt=0)
    warmup_epochs: float = Field(default=5.0, ge=0)
    milestones: list[Annotated[float, Field(gt=0)]] = []
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    sampler: Literal["instance", "class_balanced", "square_root", "progressive"] = "instance"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    mode: Literal["all", "frozen", "head-then-all"] = "all"
    head_epochs: int = Field(default=8, ge=1)
    head_lr: float = Field(default=0.03, gt=0)
    trunk_lr: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _milestones_are_met(self) -> FitConfig:
        if late := [milestone for milestone in self.milestones if milestone >= self.epochs]:
            raise ValueError(
                f"milestones must lie before the last epoch, or the rate would stay high to the end: {late[0]:g} does "
                f"not with epochs = {self.epochs}; set both"
            )
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise from one to the next, got {self.milestones}")
        return self


def _one_or_more(found: object) -> object:
    return [found] if isinstance(found, (str, Path)) else found


def _changes(found: object) -> object:
    if found is None:
        return None
    changes = _one_or_more(found)
    several = changes if isinstance(changes, list) else [changes]
    if any(isinstance(each, list) for each in several):
        changes = several = [_one_or_more(each) for each in several]
    flat = [change for each in several for change in (each if isinstance(each, list) else [each])]
    if not all(isinstance(change, str) for change in flat):
        raise ValueError("expected section.key=value, a list of those for one teacher, or a list of such lists")
    return changes


_OF_A_TEACHER = re.compile(r"\s*(augment|model|loss|fit)\.\w+\s*=")


class DistillConfig(_Section):
    """Learning from another network too; see `camcal.training.distill`.

    teacher: the folder of a finished run with the same `seed` and `data`, relative to the current folder; or a list of
        several, which are heard as one.
    set: in place of `teacher`, train one first, by this recipe without its distillation and calibration, changed in its
        sections augment, model, loss and fit by these `section.key=value`; a single one needs no list. A list of lists
        has several trained, one for each.
    weight: α, the share of what the teacher says in the loss; the rest is the loss of the labels. 0 is off.
    temperature: T, by which the logits of both are divided for it.
    """

    teacher: Annotated[list[Path] | None, BeforeValidator(_one_or_more)] = Field(default=None, min_length=1)
    set: Annotated[list[str] | list[list[str]] | None, BeforeValidator(_changes)] = None
    weight: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=3.0, gt=0)

    def changes(self) -> list[list[str]]:
        """What `set` says, teacher by teacher."""
        if self.set is None:
            return []
        several = [changes for changes in self.set if isinstance(changes, list)]
        return several or [[change for change in self.set if isinstance(change, str)]]

    @model_validator(mode="after")
    def _one_teacher_heard(self) -> DistillConfig:
        if self.teacher is not None and self.set is not None:
            raise ValueError(
                "distill.teacher and distill.set both say who teaches: choose one; distill.set=none is none"
            )
        if (self.teacher is not None or self.set is not None) and not self.weight:
            raise ValueError("a teacher needs distill.weight above 0, such as 0.5; distill.set=none is no teacher")
        return self


class CalibrateConfig(_Section):
    """The steps after training; see `camcal.training.calibrate`.

    scalar: `select` a normalised head's scalar on held-out images, or `keep` the trained one.
    spread: how far, as the standard deviation of its logarithm, the factor by which the scalar or the temperature
        changes the logits is expected to be from 1, before any image is seen, and the lean from 0; see
        `camcal.training.temperature.fit_scale`.
    rescale: of a linear head: `tau` normalises the weights by ‖W‖^τ, `lws` learns a scale a class.
    marc: fit margins.
    marc_on: the images that they are fitted on: `train` as published, the `holdout` part, or `both`.
    start: where margins start (and stay, without marc): `identity`, or `prior`, which takes the logarithm of the class
        prior that the logits are trained for from them: logit adjustment afterwards.
    penalty: λ that pulls margins towards their start, see `training.margins.fit_marc`. On `train` the defaults are
        those of the paper, `identity` and 0; with held-out images, `prior` (`identity` after rescaling) and the λ that
        cross-validation chooses. Without marc the start is `prior` too.
    lean: fit on held-out images, with the temperature, how far the logits still lean to the common classes, and take
        it out; see `camcal.training.temperature.fit_lean`.
    passes: how many augmented passes over the training images MARC's cached logits come from.
    exponent: of the generalised re-weighting, w_k ∝ (n_k/N)^-exponent.
    iterations, batch_size, lr, momentum, weight_decay: of SGD with a cosine rate; the first `warmup` iterations rise
        from half of lr, at most half of them.
    refit: once scalar and temperature are fitted, train again, on all images, the held-out ones too. What was fitted on
        held-out images is kept, margins are fitted to the new network. Training takes twice as long.
    prior: class frequencies in use, beside the balanced ones and those of training: one positive number for each
        class, as a list in the classes' order or by name.
    """

    scalar: Literal["select", "keep"] = "select"
    spread: float = Field(default=0.3, ge=1e-3)
    rescale: Literal["off", "tau", "lws"] = "off"
    marc: bool = True
    marc_on: Literal["train", "holdout", "both"] = "train"
    start: Literal["identity", "prior"] | None = None
    penalty: float | None = Field(default=None, ge=0)
    lean: bool = False
    passes: int = Field(default=4, ge=1)
    exponent: float = Field(default=1.2, ge=0, le=10)
    iterations: int = Field(default=2000, ge=1)
    warmup: int = Field(default=0, ge=0)
    batch_size: int = Field(default=512, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    refit: bool = False
    prior: list[float] | dict[str, float] | None = None

    @field_validator("prior", mode="before")
    @classmethod
    def _list_or_table(cls, found: object) -> object:
        if found is not None and not isinstance(found, (list, dict)):
            raise ValueError("must be a list of numbers in the classes' order, or a table of them by class name")
        return found


class Recipe(_Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = LossConfig()
    fit: FitConfig
    distill: DistillConfig = DistillConfig()
    calibrate: CalibrateConfig = CalibrateConfig()

    @model_validator(mode="before")
    @classmethod
    def _images_as_the_weights_know_them(cls, raw: Any) -> Any:
        """Where the data section is silent, mean, std and interpolation are those of the pretrained weights."""
        model, data = (raw.get(name) for name in ("model", "data")) if isinstance(raw, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(data, dict) or model.get("weights") in (None, "none"):
            return raw
        from camcal.models.backbones import inputs_of

        return raw | {"data": inputs_of(model.get("backbone")) | data}

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
            if self.model.scalar == _first_scalar(self.model.head):
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


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that ships with camcal, and apply `key=value` overrides.

    Args:
        source: the path of a TOML file or of a result file, or a name such as `digits`.
        overrides: `section.key=value`, the value in TOML's syntax; bare words are taken as strings, and `none`
            takes back what the recipe says of a key that may be left out.

    Raises:
        RecipeError: naming the key, what was found, and what is accepted.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"no recipe {str(source)!r}: give a TOML file or one of: {shipped}")
    return parse_recipe(_read(path), path.name, overrides)


def _read(path: Path) -> dict[str, Any]:
    """A recipe as TOML, or the one in a result file (docs/results/*.json), which so can be run again."""
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)["recipe"] if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if path.suffix == ".json":
            raise RecipeError(f"{path.name} is not a result file: it is not text in UTF-8") from None
        raise RecipeError(f"{path.name} is not valid TOML: {error}") from None
    except (ValueError, KeyError, TypeError):
        raw = None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name} is not a result file: expected JSON with a recipe in it")
    return raw


def parse_recipe(raw: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate a recipe given as nested dicts, which overrides change in place; `origin` is named in errors.

    Raises:
        RecipeError: as `load_recipe` does.
    """
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(item, origin) for item in error.errors())) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
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
        if table.get(part) is None:  # a recipe that was read back has null for what it does without
            table[part] = {}
        table = table[part]
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
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        return f"{origin}: {where.rpartition('.')[0]!r} has too few values (found {item['input']!r})"
    if item["type"] == "missing":
        return f"{origin}: {where!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
    return f"{origin}: {where!r}: {message}{found}" if where else f"{origin}: {message}"
