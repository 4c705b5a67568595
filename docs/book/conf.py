"""Sphinx's settings for the course as a site; build.py stages the pages and runs it.

Why Sphinx with MyST-NB: everything that the site needs comes with Python packages, so it is built
and read without a network. Jupyter Book 2 (MyST) fetches its theme while it builds, Quarto's
package fetches a program. Sphinx also checks references, brings a search, and can take a warning
for an error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "Federated learning, message by message"
html_title = project
language = "en"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "extension"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".py": "source"}

# The outputs are the committed ones.
nb_execution_mode = "off"
nb_merge_streams = True
# What would load scripts from elsewhere. No output is a widget; formulas are MathML.
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_static_path = ["assets"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_theme_options = {
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": [],
}
