"""Recipes: YAML files of typed steps; those in this folder are shipped with tdkit."""

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
