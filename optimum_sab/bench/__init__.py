"""Measurements that docs/benchmarks.md quotes: quality on real weights, speed on random ones."""
