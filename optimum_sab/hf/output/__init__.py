"""Where a checkpoint is written: tried beforehand, whole under its name or not there, and nothing lost on the way."""
