"""Configuration of Sphinx. No page needs the network."""

from __future__ import annotations

from pathlib import Path

import lightning_optim

project = "lightning-optim"
author = "The lightning-optim authors"
copyright = author
release = version = lightning_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generated"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"lightning-optim {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
# furo's own underlines every imported name.
pygments_dark_style = "a11y-high-contrast-dark"
# A signature that is longer has a line per parameter.
python_maximum_signature_line_length = 80
