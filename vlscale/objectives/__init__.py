"""Training objectives over the whole global batch. Each returns `(loss, metrics)` and owns the policy over ranks."""
