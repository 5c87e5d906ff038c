"""Sphinx settings."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import ptacc.errors
import ptacc.options
import ptacc.protocols
import ptacc.samplers
import ptacc.schedules
import ptacc.testing
import ptacc.tracking
import ptacc.trainers
import ptacc.tuning

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PUBLIC_MODULES = {name: "ptacc.errors" for name, value in vars(ptacc.errors).items() if isinstance(value, type)} | {
    name: module.__name__
    for module in (
        ptacc,
        ptacc.options,
        ptacc.protocols,
        ptacc.samplers,
        ptacc.schedules,
        ptacc.testing,
        ptacc.tracking,
        ptacc.trainers,
        ptacc.tuning,
    )
    for name in module.__all__
}

project = "ptacc"
copyright = "the ptacc authors"
release = importlib.metadata.version("ptacc")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ptacc {release}"
html_copy_source = False

# `name` in a docstring is formatted as code.
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

# The build must work without a network, so there is no intersphinx. External names are plain text.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|optuna|torchmetrics|accelerate|numpy|np|pd|collections|contextlib|dataclasses|typing|typing_extensions)\..*",
    ),
    (r"py:.*", r"(nn|optim|os|pathlib|datetime|abc|enum|types|tqdm)\..*"),
    # Signatures contain non-public types, such as type parameters, which are not documented.
    (r"py:.*", r"ptacc\.\w+\.\w+.*"),
    (r"py:.*", r"[A-Z]\w*T(_co|_contra)?|Mode|Path|PathLike|HistoryFile|ImageLike|Optimizer|Figure"),
    (r"py:.*", r"Tensor|BaseTrial|Processor|Rows|Factor"),
]


def find_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Any) -> Any:
    """Resolve a reference to the module that defines a public name to its entry in the reference."""
    name = node["reftarget"].rpartition(".")[2]
    if node["refdomain"] != "py" or name not in PUBLIC_MODULES:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"{PUBLIC_MODULES[name]}.{name}", node, content)


def keep_colons(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Restore the text before a colon in the docstring of a property. napoleon parses it as the type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what == "property" and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    app.connect("missing-reference", find_public_name)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)
