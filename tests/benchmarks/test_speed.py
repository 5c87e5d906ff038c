"""What makes `make bench` honest: contenders end with the same weights, and what is absent is said to be."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed.__main__ import main
from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.measuring import Comparison, Results, Turn
from benchmarks.speed.processes import Taken, WorkerError
from benchmarks.speed.ratios import estimate
from benchmarks.speed.report import from_json, goals
from benchmarks.speed.workloads import WORKLOADS
from tests.ranks import run_ranks

ALONE = [name for name, workload in WORKLOADS.items() if workload.processes == 1]
SHARED = [name for name, workload in WORKLOADS.items() if workload.processes == 2]


def done(contender: str, workload: str, folder: Path) -> tuple[float, torch.Tensor]:
    """Return the loss that a contender tells of a short run, and the weights that come of it."""
    (folder / contender).mkdir(exist_ok=True)
    job = WORKLOADS[workload].make_job(WORKLOADS[workload].short, folder / contender)
    loss = CONTENDERS[contender].load().RUNS[workload](job)
    return loss, torch.nn.utils.parameters_to_vector(job.model.parameters()).detach()


@pytest.mark.parametrize("workload", ALONE)
def test_ptacc_does_what_the_plain_loop_does(workload: str, tmp_path: Path) -> None:
    (loss, weights), (same_loss, same_weights) = (done(name, workload, tmp_path) for name in (PLAIN, "ptacc"))
    initial = torch.nn.utils.parameters_to_vector(WORKLOADS[workload].make_job(1, tmp_path).model.parameters())
    assert torch.equal(weights, same_weights)
    assert torch.equal(weights, initial) == WORKLOADS[workload].evaluates
    assert same_loss == pytest.approx(loss)


@pytest.mark.parametrize("workload", SHARED)
def test_two_processes_do_what_plain_ddp_does(workload: str, tmp_path: Path) -> None:
    def worker() -> float:
        return float((done(PLAIN, workload, tmp_path)[1] - done("ptacc", workload, tmp_path)[1]).abs().max())

    assert run_ranks(worker, 2) == [0.0, 0.0]


def test_one_command_measures_and_writes_all_three(tmp_path: Path) -> None:
    main(["--contender", "ptacc", "--workload", "step", "--pairs", "1", "--launches", "1", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "results.json").read_text())
    assert [(each["workload"], each["difference"]) for each in told["comparisons"]] == [("step", 0.0)]
    assert "ptacc" in (tmp_path / "tables.txt").read_text()
    assert (tmp_path / "chart.svg").exists()
    assert (tmp_path / "chart.png").exists()


def test_pairs_are_added_to_those_of_an_earlier_run(tmp_path: Path) -> None:
    part = ["--contender", "ptacc", "--workload", "evaluate", "--pairs", "1", "--launches", "1", "--out", str(tmp_path)]
    main(part)
    first = json.loads((tmp_path / "results.json").read_text())
    main([*part, "--add"])
    both = json.loads((tmp_path / "results.json").read_text())
    (pairs,), (more,) = ([each["pairs"] for each in told["comparisons"]] for told in (first, both))
    assert more[: len(pairs)] == pairs
    assert len(more) == 2
    assert both["circumstances"]["seconds"] > first["circumstances"]["seconds"]
    told = {**both, "circumstances": {**both["circumstances"], "machine": "another"}}
    (tmp_path / "results.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"The results are of \('another'"):
        main([*part, "--add"])
    both["comparisons"][0]["epochs"] = [1, 2]
    with pytest.raises(ValueError, match="The turns of evaluate had other lengths"):
        from_json(json.dumps(both))


def test_figures_of_two_versions_are_not_put_together() -> None:
    results = Results()
    results.note_versions({PLAIN: "1", "ptacc": "1"})
    results.note_versions({PLAIN: "1", "skorch": "1"})
    with pytest.raises(WorkerError, match="ptacc: the results so far are of another version"):
        results.note_versions({PLAIN: "1", "ptacc": "2"})


@pytest.mark.skipif(importlib.util.find_spec("skorch") is not None, reason="skorch is installed here")
def test_a_peer_that_is_not_installed_is_absent(tmp_path: Path) -> None:
    main(["--contender", "skorch", "--workload", "step", "--pairs", "1", "--out", str(tmp_path)])
    assert "skorch: No module named 'skorch'" in (tmp_path / "tables.txt").read_text()


def test_a_ratio_is_of_what_the_long_run_does_more() -> None:
    def turn(short: float, long: float) -> Turn:
        return Turn(Taken(short, short, 0.0), Taken(long, long, 0.0))

    comparison = Comparison("step", "ptacc", 0.0, [(turn(1.0, 3.0), turn(11.0, 14.0))] * 3)
    assert comparison.ratio("cpu").median == 1.5
    assert "1.05: missed" in goals(Results({("step", "ptacc"): comparison}))


def test_an_interval_holds_the_median_and_narrows_with_more_pairs() -> None:
    few, many = estimate([0.9, 1.0, 1.1]), estimate([0.9, 1.0, 1.1] * 20)
    assert few.low <= few.median <= few.high
    assert many.high - many.low < few.high - few.low
