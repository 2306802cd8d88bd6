"""The teacher during training: a live model, or a cache of its logits."""
