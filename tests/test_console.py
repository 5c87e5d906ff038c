import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from ptacc.console import LOGGER, Bar, count_columns, is_watched, messages_shown, write_line
from tests.terminals import open_terminal


@contextmanager
def unconfigured() -> Iterator[None]:
    """Remove pytest's handlers of the root logger for the block, and restore levels after it."""
    level, handlers, logging.root.handlers = logging.root.level, logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)
        LOGGER.setLevel(logging.NOTSET)


def shown_messages() -> str:
    """Return what a run writes to standard error for a message of each level."""
    with redirect_stderr(io.StringIO()) as stderr, messages_shown():
        LOGGER.debug("debug")
        LOGGER.info("info")
    return stderr.getvalue()


def test_messages_are_shown_without_any_configuration_of_logging() -> None:
    with unconfigured():
        assert shown_messages() == "info\n"
    assert (LOGGER.handlers, LOGGER.level) == ([], logging.NOTSET)


def test_runs_within_each_other_show_messages_once() -> None:
    with unconfigured(), redirect_stderr(io.StringIO()) as stderr, messages_shown(), messages_shown():
        LOGGER.info("info")
    assert stderr.getvalue() == "info\n"


@pytest.mark.parametrize(("level", "shown"), [("WARNING", ""), ("DEBUG", "debug\ninfo\n")])
def test_the_level_of_the_logger_is_the_users(level: str, shown: str) -> None:
    with unconfigured():
        LOGGER.setLevel(level)
        assert shown_messages() == shown
        assert LOGGER.level == getattr(logging, level)


@pytest.mark.parametrize("logger", [LOGGER, logging.root], ids=["ptacc", "root"])
def test_a_handler_of_the_user_replaces_ours(logger: logging.Logger) -> None:
    with unconfigured():
        handler = logging.StreamHandler(stream := io.StringIO())
        logger.addHandler(handler)
        logging.root.setLevel(logging.INFO)
        assert (shown_messages(), stream.getvalue()) == ("", "info\n")
        logger.removeHandler(handler)


def test_a_handler_of_the_logger_needs_no_level() -> None:
    with unconfigured():
        LOGGER.addHandler(handler := logging.StreamHandler(stream := io.StringIO()))
        assert (shown_messages(), stream.getvalue()) == ("", "info\n")
        LOGGER.removeHandler(handler)


def test_a_logger_that_does_not_propagate_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOGGER, "propagate", False)
    with unconfigured():
        assert shown_messages() == ""


def test_logging_that_is_configured_during_a_run_shows_messages_once() -> None:
    with unconfigured(), redirect_stderr(io.StringIO()) as stderr, messages_shown():
        LOGGER.info("before")
        logging.basicConfig(level="INFO", format="%(message)s of %(name)s")
        LOGGER.info("after")
    assert stderr.getvalue() == "before\nafter of ptacc\n"


def test_messages_and_lines_appear_above_a_bar_of_the_user() -> None:
    with open_terminal(80) as terminal, unconfigured(), redirect_stderr(terminal.file), messages_shown():
        folds = tqdm(total=2, desc="folds", file=terminal.file, ncols=60, initial=1)
        LOGGER.info("a message")
        write_line("a line", terminal.file)
        folds.close()
    assert terminal.screen[:2] == ["a message", "a line"]
    assert terminal.screen[2].startswith("folds:  50%")


def test_a_bar_is_shown_in_a_terminal_that_does_not_report_its_width() -> None:
    with open_terminal(0) as terminal:
        assert count_columns(terminal.file) == 80
        bar = Bar(terminal.file)
        bar.show("epoch 1", 1, 2, ["loss 0.5"])
        bar.close(is_complete=True)
    assert "epoch 1 |███" in terminal.text
    assert terminal.screen == [""]


def test_a_bar_shows_names_with_braces_and_counts_without_a_total() -> None:
    out = io.StringIO()
    bar = Bar(out)
    bar.show("evaluating {0}", 1200, None, ["loss 0.5"])
    bar.close(is_complete=False)
    assert "evaluating {0} 1,200, loss 0.5" in out.getvalue()


def test_a_bar_may_exceed_a_total_that_was_promised() -> None:
    out = io.StringIO()
    bar = Bar(out)
    bar.show("evaluating", 3, 2, [])
    bar.show("evaluating", 1, 0, [])
    bar.close(is_complete=True)
    assert "| 3/2" in out.getvalue()


def test_a_notebook_is_watched_and_has_a_bar_of_text_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_watched(sys.stderr)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)))
    assert is_watched(sys.stderr)
    assert not is_watched(io.StringIO())
    assert count_columns(sys.stdout) == 80
