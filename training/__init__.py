"""Code shared by both training scripts: training loop, EMA and learning rate, resuming, metrics, logging."""
