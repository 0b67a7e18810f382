"""The site: `make docs` writes it to build/docs."""

project = "merak_like"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "merak_like"
myst_heading_anchors = 3
exclude_patterns = ["images/*.md"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/, which GitHub follows
autodoc_typehints = "none"  # the signatures have them
autodoc_member_order = "bysource"
