"""The benchmark is fair: contenders end with the same weights, and missing contenders are reported."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed.__main__ import main
from benchmarks.speed.contenders import CONTENDERS, PLAIN
from benchmarks.speed.measuring import SAME_WORK, Comparison, Results, Turn, check_same_work, order_turns
from benchmarks.speed.processes import Timing, WorkerError
from benchmarks.speed.ratios import estimate
from benchmarks.speed.report import format_goals, from_json
from benchmarks.speed.workloads import WORKLOADS
from tests.ranks import run_ranks

SINGLE_PROCESS = [name for name, workload in WORKLOADS.items() if workload.processes == 1]
TWO_PROCESSES = [name for name, workload in WORKLOADS.items() if workload.processes == 2]


def run_short(contender: str, workload: str, folder: Path) -> tuple[float, torch.Tensor]:
    """Return the loss that a contender reports for a short run, and its final weights."""
    (folder / contender).mkdir(exist_ok=True)
    job = WORKLOADS[workload].make_job(WORKLOADS[workload].short, folder / contender)
    loss = CONTENDERS[contender].load().RUNS[WORKLOADS[workload].run](job)
    return loss, torch.nn.utils.parameters_to_vector(job.model.parameters()).detach()


@pytest.mark.parametrize("workload", SINGLE_PROCESS)
def test_ptacc_trains_like_the_plain_loop(workload: str, tmp_path: Path) -> None:
    (loss, weights), (same_loss, same_weights) = (run_short(name, workload, tmp_path) for name in (PLAIN, "ptacc"))
    initial = torch.nn.utils.parameters_to_vector(WORKLOADS[workload].make_job(1, tmp_path).model.parameters())
    tolerance = SAME_WORK if WORKLOADS[workload].loading == "augmented" else 0.0
    assert float((weights - same_weights).abs().max()) <= tolerance
    assert torch.equal(weights, initial) == WORKLOADS[workload].evaluates
    assert same_loss == pytest.approx(loss)


@pytest.mark.parametrize("workload", TWO_PROCESSES)
def test_two_processes_train_like_plain_ddp(workload: str, tmp_path: Path) -> None:
    def worker() -> float:
        return float((run_short(PLAIN, workload, tmp_path)[1] - run_short("ptacc", workload, tmp_path)[1]).abs().max())

    assert run_ranks(worker, 2) == [0.0, 0.0]


def test_runs_with_other_steps_or_weights_are_not_compared() -> None:
    weights = np.zeros(3, dtype=np.float32)
    plain = Timing(1.0, 1.0, 0.0, steps=256), weights
    assert check_same_work(WORKLOADS["step"], plain, plain) == 0.0
    with pytest.raises(WorkerError, match="255 steps in place of 256"):
        check_same_work(WORKLOADS["step"], plain, (Timing(1.0, 1.0, 0.0, steps=255), weights))
    with pytest.raises(WorkerError, match="the difference to the plain loop is 1e-02"):
        check_same_work(WORKLOADS["step"], plain, (plain[0], weights + 0.01))


def test_the_plain_loop_runs_between_two_contenders() -> None:
    assert order_turns("plain", ["ptacc", "ignite"], is_reversed=True) == ["ignite", "plain", "ptacc"]
    assert order_turns("plain", ["ptacc"], is_reversed=False) == ["ptacc", "plain"]


def test_one_command_measures_and_writes_all_files(tmp_path: Path) -> None:
    part = ["--contender", "ptacc", "accelerate", "--workload", "step", "--pairs", "1", "--launches", "1"]
    main([*part, "--out", str(tmp_path)])
    data = json.loads((tmp_path / "results.json").read_text())
    measured = [(each["contender"], each["difference"], len(each["pairs"])) for each in data["comparisons"]]
    assert measured == [("ptacc", 0.0, 1), ("accelerate", 0.0, 1)]
    assert "ptacc" in (tmp_path / "tables.txt").read_text()
    assert (tmp_path / "chart.svg").exists()
    assert (tmp_path / "chart.png").exists()


def test_pairs_are_added_to_those_of_an_earlier_run(tmp_path: Path) -> None:
    part = ["--contender", "ptacc", "--workload", "evaluate", "--pairs", "1", "--launches", "1", "--out", str(tmp_path)]
    main(part)
    first = json.loads((tmp_path / "results.json").read_text())
    main([*part, "--add"])
    both = json.loads((tmp_path / "results.json").read_text())
    (pairs,), (more,) = ([each["pairs"] for each in data["comparisons"]] for data in (first, both))
    assert more[: len(pairs)] == pairs
    assert len(more) == 2
    assert both["conditions"]["seconds"] > first["conditions"]["seconds"]
    changed = {**both, "conditions": {**both["conditions"], "machine": "another"}}
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"The results are of \('another'"):
        main([*part, "--add"])
    both["comparisons"][0]["epochs"] = [1, 2]
    with pytest.raises(ValueError, match="The turns of evaluate have other lengths"):
        from_json(json.dumps(both))


def test_figures_of_two_versions_are_not_combined() -> None:
    results = Results()
    results.add_versions({PLAIN: "1", "ptacc": "1"})
    results.add_versions({PLAIN: "1", "skorch": "1"})
    with pytest.raises(WorkerError, match="ptacc: the existing results are of another version"):
        results.add_versions({PLAIN: "1", "ptacc": "2"})


@pytest.mark.skipif(importlib.util.find_spec("skorch") is not None, reason="skorch is installed here")
def test_a_contender_that_is_not_installed_is_reported(tmp_path: Path) -> None:
    main(["--contender", "skorch", "--workload", "step", "--pairs", "1", "--out", str(tmp_path)])
    assert "skorch: No module named 'skorch'" in (tmp_path / "tables.txt").read_text()


def test_a_ratio_compares_the_long_runs_minus_the_short_runs() -> None:
    def turn(short: float, long: float) -> Turn:
        return Turn(Timing(short, short, 0.0), Timing(long, long, 0.0))

    comparison = Comparison("step", "ptacc", 0.0, [(turn(1.0, 3.0), turn(11.0, 14.0))] * 3)
    assert comparison.ratio("cpu").median == 1.5
    assert "1.05: missed" in format_goals(Results({("step", "ptacc"): comparison}))


def test_an_interval_holds_the_median_and_narrows_with_more_pairs() -> None:
    few, many = estimate([0.9, 1.0, 1.1]), estimate([0.9, 1.0, 1.1] * 20)
    assert few.low <= few.median <= few.high
    assert many.high - many.low < few.high - few.low
