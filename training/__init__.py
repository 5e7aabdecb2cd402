"""The training loop and what it needs: batches, optimizers, evaluation, logs."""
