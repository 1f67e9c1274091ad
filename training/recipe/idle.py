"""Overrides that would have no effect in a recipe, and so are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from camcal.training.recipe.data import MADE_TAILED
from camcal.training.recipe.recipe import Recipe
from camcal.training.recipe.section import RecipeError

_BRANCHES = ("cifar", "large", "large-official")
_LWS: dict[str, tuple[object, ...]] = {"calibrate.rescale": ("lws",)}
_MARC: dict[str, tuple[object, ...]] = {"calibrate.method": ("auto", "marc")}
_SGD = (
    _MARC | {"calibrate.marc_on": ("train",), "calibrate.penalty": (None,)},
    _MARC | {"calibrate.penalty": (0.0,)},
    _LWS,
)
_ONLY_WITH: dict[str, tuple[Mapping[str, tuple[object, ...]], ...]] = {
    "data.imbalance": ({"data.source": MADE_TAILED},),
    "data.test_fraction": ({"data.source": ("folder",)},),
    "data.split_file": ({"data.source": ("folder",)},),
    "data.train_list": ({"data.source": ("list",)},),
    "data.test_list": ({"data.source": ("list",)},),
    "model.scalar": ({"model.head": ("weight", "cosine", "cosnorm", "causal")},),
    "model.learn_scalar": ({"model.head": ("weight", "cosine", "cosnorm", "causal")},),
    "model.camc_attention": ({"model.camc": ("weights", "prototypes", "both")},),
    "model.camc_top": ({"model.camc": ("weights", "prototypes", "both")},),
    "loss.gamma": ({"loss.name": ("focal",)},),
    "loss.margin": ({"loss.name": ("ldam",)},),
    "loss.tau": ({"loss.name": ("logit_adjustment",)},),
    "loss.exponent": ({"loss.weights": ("grw",)},),
    "loss.effective_beta": ({"loss.weights": ("class_balanced",)},),
    "loss.reweight_from": ({"loss.weights": ("grw", "class_balanced")},),
    "loss.branch_beta": ({"model.reslt": _BRANCHES},),
    "loss.branch_ranks": ({"model.reslt": _BRANCHES},),
    "fit.momentum": ({"fit.optimizer": ("sgd",)},),
    "fit.head_epochs": ({"fit.mode": ("head-then-all",)},),
    "fit.head_lr": ({"fit.mode": ("head-then-all",)},),
    "fit.trunk_lr": ({"fit.mode": ("all", "head-then-all")},),
    "fit.layer_decay": ({"fit.mode": ("all", "head-then-all")},),
    "fit.lora": ({"fit.mode": ("all", "head-then-all")},),
    "fit.frozen_stages": ({"fit.mode": ("all", "head-then-all")},),
    "calibrate.scalar": ({"model.head": ("weight", "cosine", "cosnorm", "causal")},),
    "calibrate.tau": ({"calibrate.rescale": ("tau",)},),
    "calibrate.marc_on": (_MARC,),
    "calibrate.marc_lean": (_MARC,),
    "calibrate.exponent": (_MARC,),
    "calibrate.penalty": ({"calibrate.method": ("marc", "shrunk")},),
    "calibrate.passes": (_MARC, _LWS),
    "calibrate.iterations": _SGD,
    "calibrate.warmup": _SGD,
    "calibrate.batch_size": _SGD,
    "calibrate.lr": _SGD,
    "calibrate.momentum": _SGD,
    "calibrate.weight_decay": _SGD,
}
"""Keys that have an effect only if all the keys in one of their tables have one of the values there."""

_IDLE_AT: dict[str, Mapping[str, object]] = {
    "augment.fill": {
        "augment.shift": 0,
        "augment.rotate": 0.0,
        "augment.area": [1.0, 1.0],
        "augment.aspect": [1.0, 1.0],
    },
    "augment.erase_fill": {"augment.erase": 0.0},
    "distill.temperature": {"distill.weight": 0.0},
}
"""Keys that have no effect if all of these other keys have these values."""


def refuse_idle(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Raises RecipeError if an override has no effect in this recipe, since it was meant to have one."""
    values = recipe.model_dump(mode="json")

    def found(key: str) -> object:
        section, name = key.split(".")
        return values[section][name]

    for override in overrides:
        key = override.partition("=")[0].strip()
        at = _IDLE_AT.get(key)
        if at and all(found(other) == value for other, value in at.items()):
            here = " and ".join(f"{other} is {_shown(value)}" for other, value in at.items())
            raise RecipeError(f"--set {override}: it has no effect, since {here}")
        needs = _ONLY_WITH.get(key, ({},))
        missed = [[other for other, accepted in need.items() if found(other) not in accepted] for need in needs]
        if not all(missed):
            continue
        here = " and ".join(f"{other} is {_shown(found(other))}" for others in missed for other in others)
        wanted = " or ".join(
            " and ".join(f"{other} = {', '.join(map(_shown, accepted))}" for other, accepted in need.items())
            for need in needs
        )
        raise RecipeError(f"--set {override}: it has no effect, since {here}; {key} is for {wanted}")


def only_with(key: str) -> str:
    """The values of other keys without which this one has no effect, as Markdown; empty if it always has one."""
    return "; or ".join(
        " and ".join(f"`{other}` = {_either(accepted)}" for other, accepted in need.items())
        for need in _ONLY_WITH.get(key, ())
    )


def _either(accepted: Sequence[object]) -> str:
    *others, last = ("not set" if value is None else f"`{_shown(value)}`".replace("'", "") for value in accepted)
    return f"{', '.join(others)} or {last}" if others else last


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "unset" if value is None else repr(value)
