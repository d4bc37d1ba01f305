"""How does Sphinx make the documentation?"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pdiffcopy

project = "pdiffcopy"
author = "The pdiffcopy contributors"
copyright = "2026, the pdiffcopy contributors"
release = version = pdiffcopy.__version__

# The second one lists the properties of classes that users configure, and tells how each can be set.
extensions = ["sphinx.ext.autodoc", "property_manager.sphinx"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
html_theme = "alabaster"
html_extra_path = ["openapi.yaml"]


def _show_usage_literally(app, what, name, obj, options, lines):
    """The docstring of the command line is what ``--help`` prints, which isn't reStructuredText."""
    if name == "pdiffcopy.cli":
        lines[:] = ["What does the command line mean?", "", "::", "", *(f"   {line}" for line in lines)]


def _avoid_keyword_references(app, what, name, obj, options, lines):
    """What property_manager adds refers to the documentation of Python, which isn't fetched: docs build offline."""
    lines[:] = [line.replace(":keyword:`del`", "``del``") for line in lines]


def _place_pictures(app, path, docname, content):
    """The readme lies in another folder than the page that includes it."""
    content[0] = content[0].replace(".. image:: docs/", ".. image:: ")


def setup(app):
    """Called by Sphinx."""
    app.connect("include-read", _place_pictures)
    # One before and one after property_manager.sphinx, which listens too.
    app.connect("autodoc-process-docstring", _show_usage_literally, priority=100)
    app.connect("autodoc-process-docstring", _avoid_keyword_references, priority=900)
