"""Execution of a plan: fit the factors and replace the layers, all of them or none."""
