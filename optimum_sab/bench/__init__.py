"""Measurements that docs/benchmarks.md quotes: layer errors and perplexity on real weights."""
