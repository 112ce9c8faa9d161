"""The settings of Sphinx, for `make docs`. The sources are the whole checkout, because the pages link to files all over it."""

from gcnet_ext import __version__

project = "gcnet_ext"
release = version = __version__
copyright = "the gcnet_ext developers"
html_theme = "furo"
include_patterns = ["*.md", "docs/*.md", "tests/README.md"]
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The docstrings write `name` in single backticks, as Markdown does.
default_role = "code"
napoleon_custom_sections = ["Shapes"]
autodoc_typehints = "none"  # the docstrings say what an argument is
autodoc_member_order = "bysource"
autoclass_content = "class"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_copy_source = False
