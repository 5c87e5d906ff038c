"""Elements of HTML and SVG. They are serialized with all text escaped."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, tostring

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither HTML nor XML may contain."""


def element(tag: str, *children: Element | str, **attributes: str | float) -> Element:
    """Return an element. In the names of attributes, `_` stands for `-`, and `class_` is `class`.

    Example:
        >>> to_html(element("p", "a < b ", element("b", "c"), class_="x"))
        '<p class="x">a &lt; b <b>c</b></p>'
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: clean(str(value)) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + clean(child)
        else:
            made.text = (made.text or "") + clean(child)
    return made


def clean(text: str) -> str:
    """Replace characters that cannot be in a page."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def to_html(root: Element) -> str:
    """Return the text of an element."""
    return tostring(root, encoding="unicode", method="html")
