"""What the teacher says about a batch: run live, or read from a cache of its logits."""
