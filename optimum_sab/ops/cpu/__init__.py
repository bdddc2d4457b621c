"""Linears with packed weights on CPUs: a kernel in C that is compiled at first use."""
