"""The pages are true: their Python runs and type-checks, and what they show as printed or refused is."""

import re
from pathlib import Path

import pytest

import ptacc.protocols
import ptacc.testing
from tests.docs.pages import PAGES, ROOT, fences_of, refusals, said_by, squeeze


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page: Path) -> None:
    shown = {fence.line: squeeze(fence.body) for fence in fences_of(page)}
    for line, text in said_by(page).items():
        assert shown[line] == squeeze(text), f"{page.name}:{line}: `python -m tests.docs.pages` brings it up to date"


def test_the_pages_type_check_but_for_the_mistakes_they_show() -> None:
    shown = {(page.stem, fence.line): fence.errors for page in PAGES for fence in fences_of(page) if fence.errors}
    assert refusals() == shown


def test_the_reference_has_every_public_name_once() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto\w+:: (ptacc\.[\w.]+)(?=\(|$)", reference, re.MULTILINE)
    errors = [f"ptacc.errors.{name}" for name, value in vars(ptacc.errors).items() if isinstance(value, type)]
    modules = (ptacc, ptacc.protocols, ptacc.testing)
    assert sorted(named) == sorted(
        errors + [f"{module.__name__}.{name}" for module in modules for name in module.__all__]
    )
