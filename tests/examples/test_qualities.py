"""Each example runs and reaches the quality that the documentation states for it."""

import sys
from pathlib import Path

import pytest

from tests.examples.notebook import read
from tests.examples.qualities import EXAMPLES, PAGE, ROOT, Example, run
from tests.ranks import launch

OTHERS = {"digits.py", "digits_plain.py", "gpt.py"}
"""Examples with tests of their own."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.script != "zero.py"], ids=lambda example: example.script)
def test_an_example_reaches_its_quality(example: Example) -> None:
    value = run(example).value
    assert value <= example.least if example.is_loss else value >= example.least


def test_every_example_is_in_the_table_with_its_quality() -> None:
    table = PAGE.read_text(encoding="utf-8")
    rows = {example.script: f"{'≤' if example.is_loss else '≥'} {example.least:g} |" for example in EXAMPLES}
    lines = {script: next(line for line in table.splitlines() if line.startswith(f"| `{script}` |")) for script in rows}
    assert [script for script, limit in rows.items() if limit not in lines[script]] == []


def test_every_example_is_tested() -> None:
    folder = ROOT / "examples"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in {".py", ".ipynb"}}
    assert files == OTHERS | {example.script for example in EXAMPLES}


def test_the_notebook_type_checks_and_is_stored_without_outputs(tmp_path: Path) -> None:
    cells = [cell for cell in read(ROOT / "examples" / "notebook.ipynb").cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    code = tmp_path / "notebook.py"
    code.write_text("\n".join(cell.source for cell in cells), encoding="utf-8")
    process = launch([sys.executable, "-m", "mypy", "--config-file", str(ROOT / "mypy.ini"), str(code)], timeout=100)
    assert process.returncode == 0, process.stdout
