"""The Python in README.md and docs/**/*.md: what is in it, what it prints, and what is refused of it.

A fence marked python is run, all of a page's in one namespace, and type-checked. A comment above a fence changes that:

- `<!-- not run: why -->`: neither run nor checked.
- `<!-- refused by mypy -->`: checked and not run; each `# error:` in it is what mypy says of the lines above.
- `<!-- refused -->`: run and not checked; it raises an error of ptacc, whose message is the text fence that follows.
- `<!-- output -->`, above a text fence: what the fence before it prints.

`python -m tests.docs.pages` writes into the pages what the code of today prints and refuses. Read the difference.
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

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
WIDTH = 112
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>python|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
ERROR = re.compile(r"^(?P<indent> *)# error: (?P<message>.*(?:\n *#  .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    mark: str
    language: str
    body: str
    line: int

    @property
    def is_run(self) -> bool:
        return self.language == "python" and self.mark in ("", "refused")

    @property
    def is_checked(self) -> bool:
        return self.language == "python" and self.mark in ("", "refused by mypy")

    @property
    def errors(self) -> list[str]:
        return [re.sub(r"\n *# +", " ", found["message"]) for found in ERROR.finditer(self.body)]


def fences_of(page: Path) -> Iterator[Fence]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        mark = (found["mark"] or "").split(":")[0]
        yield Fence(mark, found["language"], found["body"], text.count("\n", 0, found.start("body")))


def on_their_lines(fences: Iterable[Fence]) -> str:
    """Join fences with each line where it stands in its page, so that errors point there."""
    lines: list[str] = []
    for fence in fences:
        lines += [""] * (fence.line - len(lines)) + fence.body.splitlines()
    return "\n".join(lines) + "\n"


def squeeze(text: str) -> str:
    return " ".join(text.split())


# ---- running


def said_by(page: Path) -> dict[int, str]:
    """Run a page in a process of its own, and return what should stand in each text fence, by the fence's line."""
    with tempfile.TemporaryDirectory() as folder:
        (said,) = run_ranks(run_page, 1, page, folder)
    return said


def run_page(page: Path, folder: str) -> dict[int, str]:
    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # readers begin without a launcher
    said: dict[int, str] = {}
    namespace: dict[str, object] = {"__name__": "__main__"}
    fences = list(fences_of(page))
    for fence, following in zip(fences, [*fences, None][1:], strict=True):
        if fence.is_run:
            text = run_fence(page, fence, namespace)
            if following is not None and (fence.mark == "refused" or following.mark == "output"):
                said[following.line] = text
    return said


def run_fence(page: Path, fence: Fence, namespace: dict[str, object]) -> str:
    code = compile(on_their_lines([fence]), str(page), "exec")
    try:
        with redirect_stdout(StringIO()) as printed:
            exec(code, namespace)
    except PtaccError as error:
        if fence.mark != "refused":
            raise
        return str(error)
    if fence.mark == "refused":
        raise AssertionError(f"{page.name}:{fence.line}: is not refused")
    return printed.getvalue()


# ---- type-checking


def refusals() -> dict[tuple[str, int], list[str]]:
    """Type-check all pages at once, and return mypy's errors by page and line of the fence that they are in."""
    with tempfile.TemporaryDirectory() as folder:
        for page in PAGES:
            checked = on_their_lines(fence for fence in fences_of(page) if fence.is_checked)
            Path(folder, page.with_suffix(".py").name).write_text(checked, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *map(str, sorted(Path(folder).iterdir()))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    starts = {page.stem: [fence.line for fence in fences_of(page)] for page in PAGES}
    refused: dict[tuple[str, int], list[str]] = {}
    for found in re.finditer(r"^([^:\n]+):(\d+): error: (.*)  \[[\w-]+\]$", done.stdout, re.MULTILINE):
        stem = Path(found[1]).stem
        start = max(line for line in starts[stem] if line < int(found[2]))
        refused.setdefault((stem, start), []).append(found[3])
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return refused


# ---- writing


def refresh(page: Path, said: dict[int, str], refused: dict[tuple[str, int], list[str]]) -> None:
    text = page.read_text(encoding="utf-8")

    def renew(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start("body"))
        body = found["body"]
        if line in said:
            is_output = (found["mark"] or "") == "output"
            body = said[line].rstrip("\n") + "\n" if is_output else textwrap.fill(said[line], WIDTH) + "\n"
        elif found["mark"] == "refused by mypy":
            body = renew_errors(body, refused.get((page.stem, line), []))
        return found[0].replace(found["body"], body) if found["body"] else found[0]

    page.write_text(FENCE.sub(renew, text), encoding="utf-8")


def renew_errors(body: str, messages: Sequence[str]) -> str:
    left = list(messages)

    def renew(found: re.Match[str]) -> str:
        if not left:
            return found[0]
        indent = found["indent"]
        return textwrap.fill(
            f"error: {left.pop(0)}",
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    renewed = ERROR.sub(renew, body)
    return renewed + "".join(f"# error: {message}\n" for message in left)


if __name__ == "__main__":
    all_refused = refusals()
    for page in PAGES:
        try:
            said = said_by(page)
        except RankFailed as failure:
            sys.exit(f"{page}: {failure}")
        refresh(page, said, all_refused)
