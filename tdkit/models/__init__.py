"""The weights of a model: hosts (layer types), sites (weights), ties, replacement of layers, checkpoints."""
