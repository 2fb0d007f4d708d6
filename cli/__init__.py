"""The `darkroom` command. Nothing imports this room but the benchmarks."""
