"""What a run will take, computed before it: memory, disk, reads and time. Nothing here needs a weight."""
