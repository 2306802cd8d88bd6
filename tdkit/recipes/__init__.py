"""Named runs of typed steps; the YAML files beside this one are the recipes that tdkit ships."""

from tdkit.recipes.library import load_recipe, recipe_files, recipe_text
from tdkit.recipes.recipe import DataConfig, Recipe, Run, StepConfig
from tdkit.recipes.run import run_recipe

__all__ = [
    "DataConfig",
    "Recipe",
    "Run",
    "StepConfig",
    "load_recipe",
    "recipe_files",
    "recipe_text",
    "run_recipe",
]
