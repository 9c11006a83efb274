"""Configuration of Sphinx. No page needs the network."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

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

#: By page, what it is searched by: the words of other packages, and those that many pages have.
searched = {
    "bench": "benchmark; speed; compare",
    "callbacks-and-manual": "GAN; Fabric; manual optimization; pytorch_lightning",
    "checkpoints": "resume; checkpoint",
    "choosing": "which optimizer; best optimizer; recommend",
    "cli": "command line",
    "contributing": "custom optimizer; own optimizer; add an optimizer",
    "faq": "FAQ; help",
    "layerwise": "optimizer in backward; optimizer-in-backward; gradient release; fused backward",
    "low-rank": "GaLore; APOLLO; low rank",
    "memory": "7B; 13B; 70B; out of memory",
    "migrating": "Hugging Face; TrainingArguments; axolotl; LLaMA-Factory",
    "muon": "Muon; NorMuon",
    "options": "optim_args",
    "param-groups": "layer-wise learning rate decay; frozen parameters",
    "quickstart": "install; installation",
    "refusals": "error; troubleshooting",
    "schedule-free": "schedule-free; schedulefree",
    "schedules": "warmup; warm-up; learning rate schedule; scheduler",
    "several": "multiple optimizers; several optimizers",
    "sharded": "FSDP; FSDP2; tensor parallel",
    "xla": "TPU",
}


def _index(app: Sphinx, doctree: nodes.document) -> None:
    """Adds the index entries of a page, which the search puts first; in the pages GitHub would show them as code."""
    words = app.config.searched.get(app.env.docname, "")
    entries = [("single", word, "", "main", None) for word in words.split("; ") if word]
    if entries:
        doctree.append(addnodes.index(entries=entries))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    # All pages are read again when it changes.
    app.add_config_value("searched", {}, "env")
    app.connect("doctree-read", _index)
