"""Runs whose files the tests read, and what their pages say."""

import contextlib
import itertools
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, SeedMixin, StepResult, Steps, Trainer, TrainerCore
from ptacc.report.page import make_page
from ptacc.report.run_files import RecordedRun, read_run
from ptacc.testing import tiny_data, tiny_parts

VOID = {"meta"}


class StopsAt(Callback[TrainerCore]):
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            raise ValueError("no <data>")


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """A stream without an end."""

    @override
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data = tiny_data(80)
        return itertools.cycle(data[number] for number in range(len(data)))


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 1
    checkpoint_on_exception: bool = False


def train(folder: Path, *, fails_at: int = 0, **options: Any) -> RecordedRun:
    """Train 50 steps on a stream, evaluated every ten, or what is left of them. Return what the files say."""
    arguments: Any = {"max_steps": 50}
    arguments |= {name: options.pop(name) for name in ("max_steps", "max_time") if name in options}
    given: dict[str, Any] = {
        "checkpoint_dir": folder,
        "checkpoint_every": Steps(15),
        "log_every": Steps(5),
        "resume": True,
        **options,
    }
    trainer = Saving(**tiny_parts(), history_file=folder / "history.jsonl", callbacks=[StopsAt(fails_at)], **given)
    with contextlib.suppress(ValueError):
        trainer.train(Stream(), tiny_data(8), evaluate_every=Steps(10), **arguments)
    return read_run(folder / "history.jsonl")


class PageText(HTMLParser):
    """The text of a page. Elements that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data if data.isspace() else f"{data}\n"


def page_text(*runs: RecordedRun) -> str:
    return PageText(make_page(runs)).text


def charts(*runs: RecordedRun) -> dict[str, ET.Element]:
    """Return the charts of a page by their titles."""
    parts = make_page(runs).split("<svg ")[1:]
    svgs = [ET.fromstring("<svg " + part.partition("</svg>")[0] + "</svg>") for part in parts]
    return {svg.findtext("title", ""): svg for svg in svgs if svg.get("role") == "img"}
