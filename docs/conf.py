"""The site of this documentation: `make docs`."""

import rftcore

project = "rftcore"
author = "the authors of rftcore"
release = version = rftcore.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"rftcore {release}"
html_copy_source = False
html_show_sourcelink = False
templates_path = []
exclude_patterns = []

# $...$, headings as link targets, and `:::` blocks; GitHub shows the same files without these extensions, too.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

# `name` in a docstring is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_custom_sections = [("Shapes", "params_style"), ("Units", "params_style"), "Source"]
napoleon_use_rtype = False

# Other libraries' names stay text: their inventories would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|Tensor|diffusers|transformers|numpy|PIL|Image|DiffusionPipeline)(\..*)?"),
    (r"py:.*", r"(Callable|Iterable|Iterator|Mapping|Sequence|Any|Path|dict|list|tuple|.*Error)(\[.*)?"),
]
