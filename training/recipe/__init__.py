"""What a run is told: every option, typed and described, and recipes from files. Nothing here needs torch."""

from camcal.training.recipe.augment import AugmentConfig, Policy
from camcal.training.recipe.calibrate import CalibrateConfig
from camcal.training.recipe.data import MADE_TAILED, DataConfig
from camcal.training.recipe.distill import DistillConfig
from camcal.training.recipe.fit import FitConfig, Sampler
from camcal.training.recipe.idle import refuse_idle
from camcal.training.recipe.loading import RECIPES, load_recipe
from camcal.training.recipe.loss import LossConfig
from camcal.training.recipe.model import ModelConfig
from camcal.training.recipe.recipe import Recipe, parse_recipe
from camcal.training.recipe.section import RecipeError

__all__ = [
    "MADE_TAILED",
    "RECIPES",
    "AugmentConfig",
    "CalibrateConfig",
    "DataConfig",
    "DistillConfig",
    "FitConfig",
    "LossConfig",
    "ModelConfig",
    "Policy",
    "Recipe",
    "RecipeError",
    "Sampler",
    "load_recipe",
    "parse_recipe",
    "refuse_idle",
]
