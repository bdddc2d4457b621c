"""Interrupted runs: a folder that keeps what is finished, and what tells whose it is."""
