"""Sphinx settings."""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any

import ptacc.errors
import ptacc.protocols
import ptacc.testing

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PUBLIC = {name: "ptacc.errors" for name, value in vars(ptacc.errors).items() if isinstance(value, type)} | {
    name: module.__name__ for module in (ptacc, ptacc.protocols, ptacc.testing) for name in module.__all__
}

project = "ptacc"
copyright = "the ptacc authors"
release = version_of("ptacc")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ptacc {release}"
html_copy_source = False

# `name` in a docstring is code.
default_role = "code"
python_maximum_signature_line_length = 88

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Options", "params_style"), ("Keys", "params_style")]

# The build needs no network, so no inventory of another project: names from outside stay plain text.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|torchmetrics|accelerate|numpy|np|pd|collections|contextlib|dataclasses|typing|typing_extensions)\..*",
    ),
    (r"py:.*", r"(nn|optim|os|pathlib|datetime|abc|enum|types|tqdm)\..*"),
    # Signatures name types that are not public, such as type parameters. Those have no page.
    (r"py:.*", r"ptacc\.\w+\.\w+.*"),
    (r"py:.*", r"[A-Z]\w*T(_co|_contra)?"),
]


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Any) -> Any:
    """Resolve a reference to the module that defines a public name to its entry in the reference."""
    name = node["reftarget"].rpartition(".")[2]
    if node["refdomain"] != "py" or name not in PUBLIC:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"{PUBLIC[name]}.{name}", node, content)


def keep_colons(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Put back what stood before a colon in a property's sentence, which napoleon takes for its type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what == "property" and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("missing-reference", find_public_name)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)
