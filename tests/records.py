"""Records of a history without the times in them, for comparisons of runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMES = {"seconds", "items_per_second"}


def timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without times, also those among its values."""
    return {
        name: timeless(value) if isinstance(value, dict) else value
        for name, value in record.items()
        if name not in TIMES
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file, without times."""
    return [timeless(json.loads(line)) for line in file.read_text().splitlines()]
