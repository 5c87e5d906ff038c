"""Tables show their cells as they are, in text and in HTML."""

from html.parser import HTMLParser

import pytest
from typing_extensions import override

from ptacc.display.numbers import format_bytes, format_value
from ptacc.display.tables import Table, html_section


class Cells(HTMLParser):
    """Collects the texts of a page, and checks that each element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_texts(html: str) -> list[str]:
    parser = Cells()
    parser.feed(html)
    assert not parser.open
    return parser.texts


def test_html_shows_the_cells_as_they_are() -> None:
    table = Table((("<b>&amp;", '"x"'),), ("a<", "b"))
    assert read_texts(html_section("<i>", table)) == ["<i>", "a<", "b", "<b>&amp;", '"x"']


def test_html_has_no_colours_of_its_own() -> None:
    html = html_section("title", Table((("a", "1"),), ("name", "size"), frozenset({"size"})))
    assert "color" not in html
    assert "background" not in html


def test_numbers_are_aligned_to_the_right() -> None:
    table = Table((("a", "1"), ("b", "22")), ("name", "size"), frozenset({"size"}))
    assert table.to_text().splitlines() == ["  name  size", "  a        1", "  b       22"]
    assert '<td style="text-align: right">22</td>' in table.to_html()


def test_a_table_without_rows_says_so() -> None:
    assert Table(()).to_text() == "  (none)"
    assert read_texts(Table(()).to_html()) == []


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (1.5 * 2**30, "1.50 GiB")],
)
def test_bytes_have_binary_units(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (-2.0, "-2"), (0.1, "0.1"), (1e20, "1e+20"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_values_have_five_significant_digits(value: float, text: str) -> None:
    assert format_value(value) == text
