"""Each example runs and reaches the quality that the documentation states for it."""

import pytest

from tests.examples.qualities import EXAMPLES, PAGE, ROOT, Example, run

OTHERS = {"digits.py", "digits_plain.py", "gpt.py"}
"""Examples with tests of their own."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.script)
def test_an_example_reaches_its_quality(example: Example) -> None:
    value = run(example).value
    assert value <= example.least if example.is_loss else value >= example.least


def test_every_example_is_in_the_table_with_its_quality() -> None:
    table = PAGE.read_text(encoding="utf-8")
    rows = {example.script: f"{'≤' if example.is_loss else '≥'} {example.least:g} |" for example in EXAMPLES}
    lines = {script: next(line for line in table.splitlines() if f"`{script}`" in line) for script in rows}
    assert [script for script, limit in rows.items() if limit not in lines[script]] == []


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == OTHERS | {e.script for e in EXAMPLES}
