"""What every section of a recipe has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be read, or a key or value in it that is not accepted."""


class Section(BaseModel):
    """A table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_left_out(cls, found: object) -> object:
        """TOML has no null: `none` unsets an optional key."""
        if not isinstance(found, dict):
            return found
        optional = {key for key, field in cls.model_fields.items() if field.default is None}
        return {key: value for key, value in found.items() if value != "none" or key not in optional}
