"""The training loop: stages, optimizer steps, checkpoints, and resuming them."""
