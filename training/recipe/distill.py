"""Section `distill`: learning from another network too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from camcal.training.recipe.section import Section


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


class DistillConfig(Section):
    """Learning from another network too (knowledge distillation)."""

    teacher: Annotated[list[Path] | None, BeforeValidator(_one_or_more)] = Field(
        default=None,
        min_length=1,
        description="The folder of a finished run with the same `seed` and `data`, relative to the current folder; or "
        "a list of several, whose probabilities are averaged.",
    )
    set: Annotated[list[str] | list[list[str]] | None, BeforeValidator(_changes)] = Field(
        default=None,
        description="In place of `teacher`, train one first: by this recipe without distillation and calibration, with "
        "these `section.key=value` changed in augment, model, loss and fit. A list of lists trains several.",
    )
    weight: float = Field(
        default=0.0, ge=0, le=1, description="α, the share of the teacher in the loss; 0 is no distillation."
    )
    temperature: float = Field(
        default=3.0, gt=0, description="T, which divides the logits of teacher and student for it."
    )

    def changes(self) -> list[list[str]]:
        """The changes in `set`, teacher by teacher."""
        if self.set is None:
            return []
        several = [changes for changes in self.set if isinstance(changes, list)]
        return several or [[change for change in self.set if isinstance(change, str)]]

    @model_validator(mode="after")
    def _one_teacher_heard(self) -> DistillConfig:
        if self.teacher is not None and self.set is not None:
            raise ValueError(
                "distill.teacher and distill.set exclude each other: choose one; distill.set=none unsets it"
            )
        if (self.teacher is not None or self.set is not None) and not self.weight:
            raise ValueError("a teacher needs distill.weight above 0, such as 0.5; distill.set=none unsets it")
        return self
