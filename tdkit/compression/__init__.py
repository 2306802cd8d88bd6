"""Carrying out a plan: fit the factors and put them into the model, all of them or none."""
