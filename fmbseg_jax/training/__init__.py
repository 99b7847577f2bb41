"""The aligner's step, loop, batches, checkpoints, validation and log."""
