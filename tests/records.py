"""Records of a history without the times in them, for comparisons of runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMES = {"seconds", "items_per_second", "time"}
DESCRIPTION = {"trainer", "model", "parameters", "options", "arguments", "monitors", "environment"}


def timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without times, also those among its values, and without what describes the trainer."""
    return {
        name: timeless(value) if isinstance(value, dict) else value
        for name, value in record.items()
        if name not in TIMES | DESCRIPTION
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file that an interrupted run has in common with an uninterrupted one."""
    return [timeless(line) for line in read_all(file) if line["kind"] not in ("resumed", "end")]


def read_all(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
