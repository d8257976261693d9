"""The committed results and the documents that quote them."""
import json

import pytest
import results

RUNS = json.loads(results.FILE.read_text())


@pytest.mark.parametrize("path", results.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- end -->" in text and results.written(text, RUNS) == text


def test_the_results_are_of_several_seeds_with_intervals_around_their_means():
    assert sorted(run["seed"] for run in RUNS["stickers"]) == [0, 1, 2]
    runs = [run for found in RUNS.values() for run in found]
    tables = [run.get("generation", {}) for run in runs]
    tables += [{row["row"]: row["measures"] for row in run["rows"]} for run in runs if "rows" in run]
    for measured in (found for table in tables for found in table.values()):
        for name, x in ((name, x) for name, x in measured.items() if x):
            assert x["mean"] is None or x["low"] <= x["mean"] <= x["high"], name


def test_a_table_shows_means_and_extremes_of_several_runs_and_the_interval_of_one():
    def run(mean):
        return {"generation": {"real": {"a": {"mean": mean, "low": 0.1, "high": 0.9}}}}
    table = results.generation([run(0.25), run(0.5)], ["a"])
    assert table == "|  | real |\n| --- | --- |\n| a | 0.375 (0.250–0.500) |"
    assert results.generation([run(0.5), run(0.5)], ["a"], 2).endswith("| a | 0.50 |")
    assert results.generation([run(0.5)], ["a"], 1).endswith("| a | 0.5 [0.1, 0.9] |")


def test_a_run_is_read_to_four_digits(tmp_path):
    (tmp_path / "config.json").write_text('{"machine": {"torch": "2"}}')
    (tmp_path / "metrics.json").write_text('{"seed": 3, "x": [0.123456, null], "y": {"mean": 1.00004}}')
    found = {"machine": {"torch": "2"}, "seed": 3, "x": [0.1235, None], "y": {"mean": 1.0}}
    assert results.read_run(tmp_path) == found
