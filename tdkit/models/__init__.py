"""How a model holds its weights: hosts, sites, ties, replacement of layers, checkpoints."""
