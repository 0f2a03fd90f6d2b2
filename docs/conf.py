"""The manual's settings: ``sphinx-build -W docs docs/_build`` makes it."""

import datetime

import optax_dcasgd

project = "optax_dcasgd"
author = "the optax_dcasgd authors"
project_copyright = f"{datetime.date.today().year}, {author}"
version = release = optax_dcasgd.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
mathjax_path = "mathjax/tex-chtml.js"  # where that extension puts it
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Pages in Markdown; those that begin with a notebook's header are executed as the manual is built.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # only what has changed is executed again
nb_execution_timeout = 900  # seconds a cell, for a machine with other work
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings are Google's style; what stands in single backticks in them is a public name.
default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings say what the arguments are
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "optax_dcasgd"
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the side bar
}
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_show_sourcelink = False
