"""Multiplying by factors: paths, their costs, the backward pass, cached weights and kernels."""
