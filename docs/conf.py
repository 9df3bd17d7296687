"""Settings of Sphinx. `make site` builds this folder into build/site: offline, and with warnings as errors."""

import sys
from pathlib import Path

import tve_hf

sys.path.append(str(Path(__file__).parent / "_extensions"))

project = "tve_hf"
author = "the authors of tve_hf"
copyright = f"2026, {author}"
release = version = tve_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
extensions += ["docstrings", "commands", "links", "accessible"]  # of _extensions/
exclude_patterns = ["_*", "comparison/**"]
smartquotes_action = "D"  # dashes alone: who copies a quoted pattern needs its quotes
myst_heading_anchors = 3
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = "tve_hf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/tve-hf/tve_hf/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": [],  # which stand outside of every landmark
}
html_copy_source = False
