"""PEFT on packed layers: what works does so by itself, and what would read a packed weight is refused by name."""
