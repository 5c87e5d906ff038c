"""Docstrings, comments, messages and pages contain none of the words listed below."""

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
    *sorted((ROOT / "changelog.d").glob("*.md")),
]

# Words to avoid, with their replacements.
WORDS = {
    r"(?<!there )\bis (?-i:none)\b": "is not a, is invalid",
    r"(?<!there )\bis no\b(?! longer| more)": "is not a, invalid",
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
# A docstring does not start with these verbs.
OPENINGS = ("Have ", "Let ", "Be ", "Say ", "Take in ", "Put back ", "Tell ", "Heed ", "Look ")
# Exceptions: (file name, text), with the reason.
ALLOWED = {("+names.changed.md", "heeded_signals"): "an old public name"}


def read_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of the comments and strings in a module, with their numbers."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in {tokenize.COMMENT, tokenize.STRING}:
            yield from enumerate(token.string.splitlines(), start=token.start[0])


def find_listed_words(lines: Iterator[tuple[int, str]], name: str) -> list[str]:
    """Return the lines with a listed word, with its replacement."""
    found: list[str] = []
    for number, line in lines:
        for word, replacement in WORDS.items():
            match = re.search(word, line, re.IGNORECASE)
            if match and (name, match.group()) not in ALLOWED:
                found.append(f"{name}:{number}: {match.group()!r} ({replacement}): {line.strip()}")
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_no_listed_word(path: Path) -> None:
    assert find_listed_words(read_prose(path), path.name) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_listed_word(path: Path) -> None:
    assert find_listed_words(iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)), path.name) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_starts_with_a_listed_verb(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    assert [text for text in texts if text.startswith(OPENINGS)] == []


def test_listed_words_are_found() -> None:
    text = "The manifest is none. Processes that wish to go on are told beside the others; there is no longer a wait."
    assert len(find_listed_words(iter([(1, text)]), "x")) == 5
