"""The training loop that both training stages share: trainer, optimizer, resuming, metrics, logging."""
