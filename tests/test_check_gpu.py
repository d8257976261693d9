"""check_gpu.py works: each of its groups on the CPU, small; and what is wrong is called so."""
import json
from pathlib import Path

import check_gpu
import pytest
import torch
from check_gpu import Checks, count, overlap, published, waits

import gnn
import train


@pytest.fixture
def check(tmp_path):
    return Checks(torch.device("cpu"), True, tmp_path)


def main(tmp_path, *groups):
    """Exit status and the JSON."""
    status = check_gpu.main([*groups, "--device", "cpu", "--out", str(tmp_path / "found.json")])
    return status, json.loads((tmp_path / "found.json").read_text())


def test_all_that_is_quick_passes_and_is_written_down(tmp_path, capsys):
    status, found = main(tmp_path, "products", "sampling", "waits")
    printed = capsys.readouterr().out
    assert status == found["failed"] == 0 and "no GPU here but cpu" in printed
    assert {row["group"] for row in found["rows"]} == {"products", "sampling", "waits"}
    assert all(row["name"] in printed for row in found["rows"])
    names = [row["name"] for row in found["rows"]]
    assert {f"a step of {stage}" for stage in train.STAGES if stage not in ("features", "evaluation", "report")} < set(names)
    assert sum(row.get("used_here", False) for row in found["rows"]) == 4      # two kinds of index, two precisions


def test_a_wrong_product_and_a_group_that_stops_are_failures_and_the_others_go_on(tmp_path, monkeypatch):
    right = gnn._bag_product
    monkeypatch.setattr(gnn, "_bag_product", lambda graph, x: 1.001 * right(graph, x))
    monkeypatch.setattr(check_gpu, "sampling", lambda check: 1 / 0)
    monkeypatch.setattr(check_gpu, "GROUPS", {"stops": lambda check: 1 / 0, "products": check_gpu.products})
    status, found = main(tmp_path)
    failed = [row for row in found["rows"] if row["ok"] is False]
    assert status == len(failed) == 3 and "ZeroDivisionError" in failed[0]["error"]
    assert all(row["value"] == pytest.approx(1e-3, rel=0.1) for row in failed[1:])


def test_a_step_that_looks_at_a_number_is_named_by_its_line(check, monkeypatch):
    loss = gnn.bpr_loss
    source = "def bpr_loss(pos, neg):\n    return loss(pos, neg) * (1 if loss(pos, neg).item() else 0)"
    scope = {"loss": loss}
    exec(compile(source, str(Path(gnn.__file__)), "exec"), scope)       # as if it stood in gnn.py
    monkeypatch.setattr(gnn, "bpr_loss", scope["bpr_loss"])
    monkeypatch.setattr(train, "STAGES", {name: train.STAGES[name] for name in ("features", "gnn")})
    check_gpu.host_waits(check)
    failed = {row["name"]: row["waits"] for row in check.rows if row["ok"] is False}
    assert failed == {"a step of gnn": {"gnn.py:2 bpr_loss": 2}}        # the summed score's and each modality's


def test_waits_are_counted_on_a_gpu_by_its_own_warnings(monkeypatch):
    """A stand-in: what torch says where it waits."""
    import warnings
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits(True) as lines:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert lines == {"torch": 1} and modes == ["warn", "default"]


def test_work_is_counted_as_by_hand():
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    flops, kernels, kept = count(lambda: (a @ b).sum().backward())
    assert flops == 3 * 2 * 3 * 4 * 5 and kept == 4 * (12 + 20)
    assert 4 <= kernels <= 8        # a product, a sum, two products back, and what makes their gradient


def test_intervals_that_overlap():
    def metrics(low, high):
        return {"generation": {"x": {"a": {"mean": 0.5, "low": low, "high": high},
                                     "b": {"mean": 0.5, "low": 0.4, "high": 0.6}, "c": {"mean": None, "low": None, "high": None}}}}
    assert overlap(metrics(0.1, 0.2), metrics(0.15, 0.3)) == 1
    assert overlap(metrics(0.1, 0.2), metrics(0.21, 0.3)) == overlap(metrics(0.21, 0.3), metrics(0.1, 0.2)) == 0.5


def test_what_the_cpu_reached_is_read_from_the_results():
    bars, seconds = published()
    assert 0.5 < bars["consistency"][0] <= bars["consistency"][1] <= 1 and bars["grammatical"] == (1, 1)
    assert {"autoencoder", "codebook", "text", "image"} <= set(seconds) <= {*train.STAGES, "data", "total"}


def test_whole_runs_and_profiles(tmp_path, monkeypatch):
    """The slowest: three short runs. The larger data are left out, as where little time is left, and so is the compiler."""
    monkeypatch.setattr(check_gpu, "LIMIT", 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    status, found = main(tmp_path, "whole", "profile")
    rows = {row["name"]: row for row in found["rows"]}
    assert status == 0 and rows["MovieLens-1M's size"]["left_out"]
    assert rows["stickers, all"]["s"] > rows["stickers, training"]["s"] > 0
    assert rows["stickers, image"]["gflop"] > 0 and rows["stickers, image"]["steps"] == 4
    assert rows["reward, frozen weights cast once"]["kernels"] < rows["a step of reward"]["kernels"]
