"""Run and type-check the Python code blocks in README.md and docs/.

All `python` blocks of a page run in one namespace and are type-checked. A comment above a block changes that:

- `<!-- not run: reason -->`: the block is neither run nor checked.
- `<!-- mypy errors -->`: the block is checked, not run. Each `# error:` in it is mypy's message about the line above.
- `<!-- raises -->`: the block is run, not checked. It raises an error of ptacc, or an `AttributeError` or `TypeError`,
  whose message is in the next text block.
- `<!-- output -->`, above a text block: the text is the output of the block before it.

`python -m tests.docs.pages` writes the current outputs and messages into the pages. Review the diff.
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ptacc.errors import PtaccError
from tests.ranks import RankFailed, run_ranks
from tests.vision.environment import enable_vision

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NEED_VISION = {"vision"}
"""Names of the pages that import timm and torchvision."""
WIDTH = 112
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>python|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
ERROR = re.compile(r"^(?P<indent> *)# error: (?P<message>.*(?:\n *#  .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class CodeBlock:
    mark: str
    language: str
    body: str
    line: int

    @property
    def is_run(self) -> bool:
        return self.language == "python" and self.mark in ("", "raises")

    @property
    def is_type_checked(self) -> bool:
        return self.language == "python" and self.mark in ("", "mypy errors")

    @property
    def mypy_errors(self) -> list[str]:
        return [re.sub(r"\n *# +", " ", match["message"]) for match in ERROR.finditer(self.body)]


def read_blocks(page: Path) -> Iterator[CodeBlock]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        mark = (match["mark"] or "").split(":")[0]
        yield CodeBlock(mark, match["language"], match["body"], text.count("\n", 0, match.start("body")))


def join_at_page_lines(blocks: Iterable[CodeBlock]) -> str:
    """Join code blocks, each at its line of the page, so that line numbers in errors refer to the page."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines)) + block.body.splitlines()
    return "\n".join(lines) + "\n"


def collapse_whitespace(text: str) -> str:
    return " ".join(text.split())


# ---- running


def collect_outputs(page: Path) -> dict[int, str]:
    """Run a page in a separate process, and return the expected content of text blocks by their line."""
    with tempfile.TemporaryDirectory() as folder:
        (outputs,) = run_ranks(run_page, 1, page, folder)
    return outputs


def run_page(page: Path, folder: str) -> dict[int, str]:
    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # the pages assume no launcher
    if page.stem in NEED_VISION:
        enable_vision()
    outputs: dict[int, str] = {}
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(read_blocks(page))
    for block, following in zip(blocks, [*blocks, None][1:], strict=True):
        if block.is_run:
            text = run_block(page, block, namespace)
            if following is not None and (block.mark == "raises" or following.mark == "output"):
                outputs[following.line] = text
    return outputs


def run_block(page: Path, block: CodeBlock, namespace: dict[str, object]) -> str:
    code = compile(join_at_page_lines([block]), str(page), "exec")
    try:
        with redirect_stdout(StringIO()) as printed:
            exec(code, namespace)
    except (PtaccError, AttributeError, TypeError) as error:
        if block.mark != "raises":
            raise
        return str(error)
    if block.mark == "raises":
        raise AssertionError(f"{page.name}:{block.line}: raises no error")
    return printed.getvalue()


# ---- type-checking


def collect_mypy_errors() -> dict[tuple[str, int], list[str]]:
    """Type-check all pages in one run, and return mypy's errors by page and line of the code block."""
    with tempfile.TemporaryDirectory() as folder:
        for page in PAGES:
            code = join_at_page_lines(block for block in read_blocks(page) if block.is_type_checked)
            Path(folder, page.with_suffix(".py").name).write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *map(str, sorted(Path(folder).iterdir()))]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    block_lines = {page.stem: [block.line for block in read_blocks(page)] for page in PAGES}
    errors: dict[tuple[str, int], list[str]] = {}
    for match in re.finditer(r"^([^:\n]+):(\d+): error: (.*)  \[[\w-]+\]$", result.stdout, re.MULTILINE):
        stem = Path(match[1]).stem
        block_line = max(line for line in block_lines[stem] if line < int(match[2]))
        errors.setdefault((stem, block_line), []).append(match[3])
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return errors


# ---- writing


def update_page(page: Path, outputs: dict[int, str], mypy_errors: dict[tuple[str, int], list[str]]) -> None:
    text = page.read_text(encoding="utf-8")

    def update_block(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start("body"))
        body = match["body"]
        if line in outputs:
            is_output = (match["mark"] or "") == "output"
            body = (outputs[line].rstrip("\n") if is_output else textwrap.fill(outputs[line], WIDTH)) + "\n"
        elif match["mark"] == "mypy errors":
            body = update_mypy_errors(body, mypy_errors.get((page.stem, line), []))
        return match[0].replace(match["body"], body) if match["body"] else match[0]

    page.write_text(BLOCK.sub(update_block, text), encoding="utf-8")


def update_mypy_errors(body: str, messages: Sequence[str]) -> str:
    remaining = list(messages)

    def update_error(match: re.Match[str]) -> str:
        if not remaining:
            return match[0]
        indent = match["indent"]
        return textwrap.fill(
            f"error: {remaining.pop(0)}",
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    updated = ERROR.sub(update_error, body)
    return updated + "".join(f"# error: {message}\n" for message in remaining)


if __name__ == "__main__":
    all_mypy_errors = collect_mypy_errors()
    for page in PAGES:
        try:
            page_outputs = collect_outputs(page)
        except RankFailed as failure:
            sys.exit(f"{page}: {failure}")
        update_page(page, page_outputs, all_mypy_errors)
