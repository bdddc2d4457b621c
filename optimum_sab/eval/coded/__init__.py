"""Coded planes, simulated: several planes out of one stored bit (docs/benchmarks.md has what they are worth)."""
