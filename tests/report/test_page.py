"""The page of runs is complete by itself, escaped, small, and readable on a phone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ptacc.report.page import make_labels, make_page
from ptacc.report.run_files import RecordedRun
from tests.report.runs import charts, page_text, train

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CHECK = """<iframe id=f src="page.html" style="width:360px;height:600px;border:0"></iframe>
<script>onload = () => {document.title = "width " + f.contentDocument.documentElement.scrollWidth}</script>"""


def made(path: str, values: dict[str, dict[int, float]]) -> RecordedRun:
    return RecordedRun(Path(path), values=values, step=max(step for points in values.values() for step in points))


def test_the_page_of_a_run_has_its_curves_and_tables(tmp_path: Path) -> None:
    train(tmp_path, fails_at=27)
    run = train(tmp_path)
    assert [*charts(run)] == ["Loss", "Learning rate", "Items per second"]
    text = page_text(run)
    for part in (
        "complete",
        "50 of 50",
        "once, from step 15",
        "eval_loss",
        "Steps(n=15)",
        "default of CheckpointMixin",
    ):
        assert part in text
    assert "failed: ValueError: no <data>" in text  # how the first attempt ended


def test_each_evaluation_and_each_checkpoint_is_marked(tmp_path: Path) -> None:
    train(tmp_path, fails_at=27)
    loss = charts(train(tmp_path))["Loss"]
    titles = [title.text or "" for title in loss.iter("title")]
    assert [re.findall(r"step (\d+)", title) for title in titles[1:]] == [["10"], ["20"], ["30"], ["40"], ["50"]]
    marks = {part.get("class"): part.get("d", "").count("M") for part in loss.iter("path")}
    assert (marks["checkpoint c0"], marks["resumption c0"]) == (4, 1)


def test_several_runs_share_charts_and_their_differences_are_listed(tmp_path: Path) -> None:
    runs = [train(tmp_path / "short", max_steps=20), train(tmp_path / "long", keep_last=2)]
    loss = charts(*runs)["Loss"]
    assert (loss.findtext("desc") or "").count("long: eval_loss: 5 values") == 1
    curves = [part.get("class") for part in loss.iter("path") if "curve" in part.get("class", "")]
    assert curves == ["curve c0 d0", "curve c0 d1", "curve c1 d0", "curve c1 d1"]
    differences = page_text(*runs).partition("Options that differ\n")[2].partition("Details")[0]
    assert re.findall(r"^(\w+)\nshort\n(.+)\n\1\nlong\n(.+)$", differences, re.MULTILINE) == [
        ("keep_last", "None", "2"),
        ("max_steps", "20", "50"),
    ]


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = make_page([train(tmp_path)])
    assert re.findall(r"<(?:script|link|img|iframe|object)|\b(?:src|href)=|url\(|@import|https?:", page) == []


def test_everything_is_escaped() -> None:
    evil = '</style></svg><script>alert("x")</script>&amp;\x1b\ud800'
    run = made(f"{evil}.jsonl", {evil: {1: 1.0, 2: float("nan")}})
    run.problems.append(evil)
    page = make_page([run, run])
    assert "<script" not in page
    assert page.encode()
    assert 'alert("x")</script>&amp;\N{REPLACEMENT CHARACTER}' in page_text(run)


def test_values_that_are_not_finite_are_noted() -> None:
    run = made("x", {"kl": {1: 1.0, 2: float("nan"), 3: float("inf"), 4: 1.0}})
    assert "Gaps are values that are NaN or infinite: kl 2 of 4, the first at step 2." in page_text(run)


def test_the_page_of_a_long_run_is_below_a_megabyte() -> None:
    names = ("train_loss", "eval_loss", "accuracy", "learning_rate", "grad_norm", "items_per_second")
    long = {name: {step: (step * 7919 % 1000) / 1000 for step in range(1, 100_001, 5)} for name in names}
    runs = [made(name, long) for name in "abc"]
    runs[0].step_losses = {step: (step * 7919 % 1000) / 1000 for step in range(1, 100_001)}
    assert len(make_page(runs)) < 1_000_000


def test_values_of_several_sets_share_a_chart() -> None:
    names = ("train_loss", "test/loss", "train/f1", "test/f1", "head/learning_rate", "learning_rate")
    run = made("x", {name: {1: 1.0, 2: 2.0} for name in names})
    assert [*charts(run)] == ["Loss", "f1", "Learning rate"]


def test_a_run_without_values_has_a_page() -> None:
    assert "unknown: no history file" in page_text(RecordedRun(Path("x")))


@pytest.mark.parametrize(
    ("titles", "expected"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a", "runs/a"], ["runs/a", "runs/a"]),
        (["runs", "runs/b"], ["runs", "b"]),
        (["/x/a", "b"], ["/x/a", "b"]),
    ],
)
def test_labels_leave_out_the_common_directory(titles: list[str], expected: list[str]) -> None:
    assert make_labels([RecordedRun(Path(title)) for title in titles]) == expected


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_phone_does_not_scroll_horizontally(tmp_path: Path) -> None:
    runs = [train(tmp_path / ("a" * 40)), train(tmp_path / "b", fails_at=9, checkpoint_on_exception=True)]
    page = make_page(runs).replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "phone.html").write_text(CHECK)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [
        str(BROWSER),
        *options,
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
        f"file://{tmp_path}/phone.html",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<title>width 360</title>" in dom
