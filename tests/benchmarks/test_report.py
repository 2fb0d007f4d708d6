"""Results land where they belong, and nothing else on the page changes."""

import json
from pathlib import Path

import pytest

from benchmarks import latency
from benchmarks.report import conditions, interleaved, publish, table, with_section


def test_ways_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []
    seconds = interleaved({name: lambda seed, name=name: calls.append((name, seed)) for name in "ab"}, rounds=2)  # type: ignore[misc]
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_table_shows_three_digits() -> None:
    assert table(("way", "seconds"), [("a", 0.123456), ("b", 2)]) == (
        "| way | seconds |\n| --- | --- |\n| a | 0.123 |\n| b | 2 |"
    )


def test_a_section_is_added_then_replaced_and_its_neighbours_stay() -> None:
    page = with_section(with_section("# Results\n", "one", "first"), "two", "second")
    again = with_section(page, "one", "third\n\n")
    assert page == "# Results\n\n## one\n\nfirst\n\n## two\n\nsecond\n"
    assert again == page.replace("first", "third")


def test_publish_writes_figures_and_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = conditions(threads=2)
    assert held["threads"] == 2
    publish("bench-x", {"conditions": held, "seconds": 1.5}, "so fast", tmp_path)
    assert json.loads((tmp_path / "results" / "bench-x.json").read_text())["seconds"] == 1.5
    assert "## make bench-x\n\ndevice " in (tmp_path / "RESULTS.md").read_text()
    assert capsys.readouterr().out == "so fast\n"


def test_latency_compares_medians_with_diffusers() -> None:
    seconds = {"diffusers": [1.0, 9.0, 2.0], "engine": [0.5, 1.0, 7.0]}
    text = latency.as_table({"seconds": seconds, "start to first picture": 6.25})
    assert "| engine | 1 | 2 |" in text
    assert text.endswith("6.2 s.")
