"""Sphinx settings."""

from importlib.metadata import version as version_of

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

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Options", "Hooks", "Combines with", "Source"]

# The build needs no network, so no inventory of another project: names from outside stay plain text.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|torchmetrics|accelerate|numpy|np|collections|contextlib|dataclasses|typing|typing_extensions)\..*",
    ),
    (r"py:.*", r"(nn|optim|os|pathlib|datetime|abc|enum|types|tqdm)\..*"),
    # Type parameters stand in signatures and have no page.
    (r"py:.*", r"(ptacc\..*\.)?[A-Z]\w*T(_co|_contra)?"),
]
