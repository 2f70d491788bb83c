"""HTML pages that need no network, no other file and no script, and follow the reader's theme."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from lit_prune.atomic import write_text
from lit_prune.reporting.style import DARK, LIGHT, inline_svg


def write_page(template: str, context: dict[str, Any], path: Path) -> None:
    """Render a template of this room and write it whole or not at all.

    Every value is escaped, and a name that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader("lit_prune", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(context, light=LIGHT, dark=DARK))


def plot(figure: Figure | None, name: str, description: str) -> Markup | None:
    """A figure as markup; safe, since `inline_svg` escapes what comes from outside."""
    return None if figure is None else Markup(inline_svg(figure, name, description))  # noqa: S704
