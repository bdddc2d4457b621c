"""How the samples go through the model: the lockstep, and what it needs to stop, watch and move a block."""
