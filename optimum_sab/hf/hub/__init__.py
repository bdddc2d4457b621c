"""Packed checkpoints for others: the model card, the processor that goes along, loading without us, and the upload."""
