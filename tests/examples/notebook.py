"""`python -m tests.examples.notebook FILE` runs a notebook, and prints what its last cell prints."""

import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def run(path: Path) -> Any:
    """Return the notebook with the outputs of its cells, run in an empty folder."""
    notebook = read(path)
    nbclient.NotebookClient(notebook, timeout=100).execute()
    return notebook


if __name__ == "__main__":
    sys.stdout.write(run(Path(sys.argv[1])).cells[-1].outputs[-1].text)
