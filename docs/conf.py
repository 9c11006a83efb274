"""Configuration of Sphinx. No page needs the network."""

from __future__ import annotations

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
