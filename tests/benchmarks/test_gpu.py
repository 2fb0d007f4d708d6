"""The benchmark for GPUs runs on the CPU at a small size, and compares equal batches with each other."""

import torch

from benchmarks import gpu


def test_a_small_run_measures_every_batch_size() -> None:
    figures = gpu.measure(gpu.small(), torch.device("cpu"), torch.float32, rounds=1)
    assert set(figures["seconds"]) == {"engine 1", "engine 2", "diffusers 1", "diffusers 2"}
    assert all(len(seconds) == 1 for seconds in figures["seconds"].values())


def test_the_table_compares_with_diffusers_at_the_same_batch() -> None:
    seconds = {"engine 1": [1.0], "engine 4": [2.0], "diffusers 1": [3.0]}
    text = gpu.as_table({"seconds": seconds, "peak GiB": 7.0})
    assert "| engine | 1 | 1 | 1 | 3 |" in text
    assert "| engine | 4 | 2 | 2 | not installed |" in text
