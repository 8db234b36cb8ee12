"""
Sphinx's configuration for the documentation.

To build the pages, run ``sphinx-build -W -n docs docs/_build``.
"""

from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from clerkhooks.cli.main import main

_metadata = ConfigParser()
_metadata.read(Path(__file__).parent.parent / "setup.cfg")

project = "clerkhooks"
release = version = _metadata["metadata"]["version"]
project_copyright = "the clerkhooks developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "clerkhooks"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
# Only public names are documented here. Other types may appear in a signature.
nitpick_ignore_regex = [("py:.*", r"(?!clerkhooks\.\w+$).*")]


class CommandHelp(SphinxDirective):
    """Show the output of a command's ``--help``. The argument is the name of the command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a literal block."""
        name = self.arguments[0]
        parent = click.Context(main, info_name="clerkhooks", **main.context_settings)
        text = click.Context(main.commands[name], parent, name).get_help()
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


ACCESSIBLE = {
    # Code and tables scroll on narrow screens. The keyboard must reach them.
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    '<aside class="sidebar-drawer"': '<aside aria-label="All pages" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
    '<div id="search-results">': '<h1>Search</h1><div id="search-results">',
}
"""Replacements in the theme's output, for people who use a keyboard or a screen reader."""


def improve_accessibility(app: Sphinx, error: Exception | None) -> None:
    """Add attributes to the pages that the theme omits."""
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        text = page.read_text()
        for old, new in ACCESSIBLE.items():
            text = text.replace(old, new)
        page.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive ``command-help``, and improve the pages at the end of a build."""
    app.add_directive("command-help", CommandHelp)
    app.connect("build-finished", improve_accessibility)
    return {"parallel_read_safe": True}
