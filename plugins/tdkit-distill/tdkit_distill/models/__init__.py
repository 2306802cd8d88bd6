"""How models are called, observed by hooks, given other weights, and sharded."""
