"""The benchmark of loading at a small size: both ways load the same folder, each in a process of its own."""

from pathlib import Path

from benchmarks import gpu, load


def test_both_ways_load_and_are_measured(tmp_path: Path) -> None:
    sizes = load.write(gpu.small(), tmp_path)
    assert sizes["float32"] >= sizes["float16"]
    for way in load.WAYS:
        figures = load.once(way, tmp_path / "float16", "float32")
        assert figures["seconds"] > 0
        assert figures["peak MiB"] >= figures["imports MiB"] > 50


def test_the_table_shows_medians() -> None:
    runs = [{"seconds": seconds, "peak MiB": 900, "imports MiB": 300} for seconds in (1.0, 9.0, 2.0)]
    keys = [f"{way}, {on_disk} to {dtype}" for on_disk, dtype in load.CASES for way in load.WAYS]
    text = load.as_table({"runs": dict.fromkeys(keys, runs), "weights MiB": {"float32": 400, "float16": 200}})
    assert "| ours | float32 | float32 | 2 | 900 | 400 | 300 |" in text
    assert "| diffusers | float16 | float32 | 2 | 900 | 400 | 300 |" in text
    assert "| ours | float16 | bfloat16 | 2 | 900 | 200 | 300 |" in text
