"""Layer types: how each holds its weight, and the factorised layer that replaces it; one file per type."""
