"""Training: one step, the engine under it, checkpoints, and the loop that joins them."""
