"""Section `calibrate`: the steps after training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from camcal.training.recipe.section import Section


class CalibrateConfig(Section):
    """The steps after training; see `camcal.training.calibration.calibrate`.

    scalar: `select` a normalised head's scalar on held-out images, or `keep` the trained one.
    spread: how far, as the standard deviation of its logarithm, the factor by which the scalar or the temperature
        changes the logits is expected to be from 1, before any image is seen, and the lean from 0; see
        `camcal.training.calibration.temperature.fit_scale`.
    rescale: of a linear head: `tau` normalises the weights by ‖W‖^τ, `lws` learns a scale a class.
    marc: fit margins.
    marc_on: the images that they are fitted on: `train` as published, the `holdout` part, or `both`.
    start: where margins start (and stay, without marc): `identity`, or `prior`, which takes the logarithm of the class
        prior that the logits are trained for from them: logit adjustment afterwards.
    penalty: λ that pulls margins towards their start, see `calibration.margins.fit_marc`. On `train` the defaults are
        those of the paper, `identity` and 0; with held-out images, `prior` (`identity` after rescaling) and the λ that
        cross-validation chooses. Without marc the start is `prior` too.
    lean: fit on held-out images, with the temperature, how far the logits still lean to the common classes, and take
        it out; see `camcal.training.calibration.temperature.fit_lean`.
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
