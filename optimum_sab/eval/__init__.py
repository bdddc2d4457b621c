"""Quality: baselines and measures to compare with."""
