"""`make fuzz`, small: a real stack, and every accepted job to its end."""

import json
from pathlib import Path

from benchmarks import fuzz


def test_a_small_run_finds_nothing(tmp_path: Path) -> None:
    numbers = ["--no-edges", "--document=12", "--jobs=12", "--pictures=12", "--accepted=8", "--patience=60"]
    fuzz.main([*numbers, f"--out={tmp_path}"])
    figures = json.loads((tmp_path / "results/fuzz.json").read_text())
    assert sum(figures["cases"]["document"].values()) > 100
    for task in ("img2img", "inpaint", "upscale"):
        assert f"POST /v1/{task} 422" in figures["cases"]["pictures"]
    assert figures["ends"]["succeeded"] > 20
    assert "0 answers of 5xx, 0 worker exits" in (tmp_path / "RESULTS.md").read_text()
