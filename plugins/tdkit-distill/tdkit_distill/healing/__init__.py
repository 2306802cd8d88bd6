"""Healing: a compressed model trained for a short time by its dense one, with defaults for any model."""
