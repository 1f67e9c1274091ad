from typing import get_args

import pytest
from pydantic import TypeAdapter

from camcal.training.recipe import Recipe, RecipeError, load_recipe
from camcal.training.recipe.idle import _IDLE_AT, _ONLY_WITH, refuse_idle


def test_an_override_that_would_change_nothing_is_refused() -> None:
    for good in (["loss.name=focal", "loss.gamma=1"], ["model.scalar=30"], ["data.imbalance=5"], ["fit.epochs=9"]):
        refuse_idle(load_recipe("digits", good), good)
    marc = ["calibrate.method=marc", "calibrate.marc_on=both"]
    for good in ([*marc, "calibrate.penalty=1"], ["calibrate.lr=0.1"], ["calibrate.method=lean"]):
        refuse_idle(load_recipe("digits", good), good)
    for good in (
        [*marc, "calibrate.penalty=0", "calibrate.lr=0.1"],
        ["calibrate.passes=2"],
        ["calibrate.marc_on=both"],
    ):
        refuse_idle(load_recipe("digits", good), good)
    rescaled = ["model.head=linear", "calibrate.rescale=lws", "calibrate.marc_on=both", "calibrate.lr=0.1"]
    refuse_idle(load_recipe("digits", rescaled), rescaled)
    for good in (["augment.fill=random"], ["distill.set=fit.epochs=9", "distill.weight=0.5", "distill.temperature=2"]):
        refuse_idle(load_recipe("digits", good), good)
    for idle in (
        ["distill.temperature=2"],
        ["augment.shift=0", "augment.rotate=0", "augment.area=[1, 1]", "augment.aspect=[1, 1]", "augment.fill=mirror"],
        ["augment.erase=0", "augment.erase_fill=black"],
        ["loss.gamma=1"],
        ["fit.optimizer=adamw", "fit.lr=0.001", "fit.momentum=0.8"],
        ["model.head=linear", "model.scalar=30"],
        ["calibrate.method=lean", "calibrate.exponent=1"],
        ["calibrate.marc_on=both", "calibrate.lr=0.1"],
        ["calibrate.method=shrunk", "calibrate.lr=0.1"],
        ["calibrate.method=temperature", "calibrate.passes=2"],
        ["calibrate.method=lean", "calibrate.marc_lean=true"],
        ["calibrate.penalty=1"],
        ["calibrate.method=marc", "calibrate.penalty=1", "calibrate.lr=0.1"],
    ):
        with pytest.raises(RecipeError, match=f"--set {idle[-1]}: it has no effect, since .* is ('|false|0)"):
            refuse_idle(load_recipe("digits", idle), idle)


def test_the_keys_that_depend_on_others_are_keys_of_a_recipe() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for key, needs in _ONLY_WITH.items():
        section, name = key.split(".")
        assert name in sections[section].model_fields  # type: ignore[union-attr]
        for other, accepted in (pair for need in needs for pair in need.items()):
            section, name = other.split(".")
            kind = sections[section].model_fields[name].annotation  # type: ignore[union-attr]
            if other == "calibrate.penalty":
                assert kind == float | None
            else:
                assert set(accepted) < ({True, False} if kind is bool else set(get_args(kind)))
    for key, values in _IDLE_AT.items():
        for other, value in [(key, None), *values.items()]:
            section, name = other.split(".")
            field = sections[section].model_fields[name]  # type: ignore[union-attr]
            assert value is None or TypeAdapter(field.annotation).dump_python(field.default, mode="json") == value
