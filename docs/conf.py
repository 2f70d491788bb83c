"""How the site is built: `make docs`."""

import re
from typing import Any

from docutils.nodes import Element, SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import lit_prune

project = "lit-prune"
release = lit_prune.__version__
html_theme = "furo"
html_title = f"lit-prune {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["formulas.css"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # what a library says of its own
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True

html_math_renderer = "mathml"


def plain(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in it, in which bars and stars stand for themselves."""
    if lines and lines[0].startswith("Alias for field number"):  # Python's own words
        lines.clear()
    if lines and what in ("attribute", "data"):  # what comes before a colon is not a type
        lines[:1] = re.sub(r": ", ":\n", lines[0], count=1).split("\n")
    for index, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        parts = [f"`{p}`" if p.startswith("`") else re.sub(r"([|*\\])", r"\\\1", p) for p in parts]
        lines[index] = "".join(parts)


def mathml(self: Any, node: Element) -> None:
    """Formulas as browsers know them, so that a page needs no script and no network."""
    block = isinstance(node, math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Register the two."""
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
