"""What the commands are called with. Nothing here imports torch, so help and wrong calls are answered at once."""
