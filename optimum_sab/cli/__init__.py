"""Command line: `optimum-sab …` and the same as `optimum-cli sab …`."""
