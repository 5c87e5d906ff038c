"""Prose is plain technical English: no word of the list below in docstrings, comments, messages and pages."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "examples", "benchmarks")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [
    *sorted((ROOT / "docs").glob("**/*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
]

# What is not written, and what is written instead.
WORDS = {
    r"is none\b": "is not a, is invalid",
    r"is no\b(?! longer| more)": "is not a, invalid",
    r"\b(go|goes|going|went) on\b": "continue, resume",
    r"\bbeside\b": "compared with, in addition to, next to",
    r"\btold\b|\btells? of\b": "listed, reported, documented",
    r"\bdealt\b|\bdeals? out\b|\bdealing\b": "sharded, assigned, partitioned",
    r"\bheed\w*": "apply, accept",
    r"\bhears?\b|\bheard\b": "receive, read",
    r"\bwish(es|ed)?\b": "request",
    r"\bnobody\b|\bno one\b": "name the subject",
    r"\bwhoever\b": "name the subject",
    r"\banew\b": "again",
    r"\bmeanwhile\b": "at the same time",
    r"\blest\b": "so that ... not",
    r"\bphantoms?\b": "padding",
}
# How no docstring begins: the subject or a verb in the third person or the imperative says more.
OPENINGS = ("Have ", "Let ", "Be ", "Say ", "Take in ", "Put back ", "Tell ", "Heed ", "Look ")
# (file name, text): where a word of the list is right, with the reason.
ALLOWED: dict[tuple[str, str], str] = {}


def prose_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the comments and strings of a module, each with its line."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in {tokenize.COMMENT, tokenize.STRING}:
            yield from enumerate(token.string.splitlines(), start=token.start[0])


def found_in(lines: Iterator[tuple[int, str]], name: str) -> list[str]:
    """Return each line with a word of the list, and what to write instead."""
    found: list[str] = []
    for number, line in lines:
        for word, instead in WORDS.items():
            match = re.search(word, line, re.IGNORECASE)
            if match and (name, match.group()) not in ALLOWED:
                found.append(f"{name}:{number}: {match.group()!r} ({instead}): {line.strip()}")
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_speaks_plainly(path: Path) -> None:
    assert found_in(prose_in_code(path), path.name) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_speak_plainly(path: Path) -> None:
    assert found_in(iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)), path.name) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_begins_with_a_word_of_the_list(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    assert [text for text in texts if text.startswith(OPENINGS)] == []


def test_the_list_finds_its_words() -> None:
    text = "The manifest is none. Processes that wish to go on are told beside the others; there is no longer a wait."
    assert len(found_in(iter([(1, text)]), "x")) == 5
