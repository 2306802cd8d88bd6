"""Weights of a model that share hidden units: what a group is, the patterns that find them, and the registry."""
