"""The code in the pages runs and type-checks, and the outputs and errors that they show are current."""

import re
from pathlib import Path

import pytest

import ptacc.errors
from tests.docs.pages import PAGES, ROOT, collapse_whitespace, collect_mypy_errors, collect_outputs, read_blocks
from tests.test_public_names import MODULES


def test_page_names_are_unique() -> None:
    assert len({page.stem for page in PAGES}) == len(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_shows_its_output(page: Path) -> None:
    shown = {block.line: collapse_whitespace(block.body) for block in read_blocks(page)}
    for line, text in collect_outputs(page).items():
        assert shown[line] == collapse_whitespace(text), f"{page.name}:{line}: run `python -m tests.docs.pages`"


def test_the_pages_type_check_except_for_the_errors_they_show() -> None:
    blocks = {(page.stem, block.line): block for page in PAGES for block in read_blocks(page)}
    assert collect_mypy_errors() == {key: block.mypy_errors for key, block in blocks.items() if block.mypy_errors}


def test_every_output_mark_is_directly_above_a_text_block() -> None:
    marks = re.compile(r"^<!-- output -->$(?!\n```text$)", re.MULTILINE)
    assert [page.name for page in PAGES if marks.search(page.read_text(encoding="utf-8"))] == []


def test_the_reference_lists_every_public_name_once() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto\w+:: (ptacc\.[\w.]+)(?=\(|$)", reference, re.MULTILINE)
    errors = [f"ptacc.errors.{name}" for name, value in vars(ptacc.errors).items() if isinstance(value, type)]
    assert sorted(listed) == sorted(
        errors + [f"{module.__name__}.{name}" for module in MODULES for name in module.__all__]
    )
