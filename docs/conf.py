"""The site of this documentation: `make docs`."""

import re

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

# Formulas, headings as link targets, and `:::` blocks. GitHub shows the same files.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

# `name` in a docstring is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Other libraries' names stay text: their inventories would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|Tensor|diffusers|transformers|numpy|PIL|Image|DiffusionPipeline)(\..*)?"),
    (r"py:.*", r"(collections\.abc\.|pathlib\.)?(Callable|Hashable|Iterable|Iterator|Mapping|Sequence|Path)"),
    (r"py:.*", r"rftcore\.training\.config\.\w+|typing\.Literal.*"),  # `rftcore train draft --help` describes them
    (r"py:.*", r"(Any|dict|list|tuple|set|[A-Z]\w*Error)(\[.*)?"),
]

_LABEL = re.compile(r"(Shapes|Units|Raises|Returns|Source): ")
_BULLET = re.compile(r"\s*- ")


def setup(app):
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # before napoleon's 500
    app.connect("missing-reference", by_last_name)


def to_restructured_text(app, what, name, thing, options, lines):
    """Docstrings are written for the reader of the code: what reStructuredText wants besides is added here."""
    written, bullets = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if _BULLET.match(line):
            if bullets is None and written and written[-1].strip():
                written.append("")
            bullets = indent
        elif bullets is not None and line.strip() and indent <= bullets:
            written.append("")
            bullets = None
        if label := _LABEL.match(line):
            written += ["", f"**{label[1]}:** {line[label.end() :]}"]
        else:
            written.append(line)
    # Napoleon takes what stands before the first colon of a property's first line for its type: let that be a comment.
    first = ["..", ""] if what in ("property", "attribute") else []
    lines[:] = [*first, *map(_without_substitutions, written)]


def _without_substitutions(line):
    """|r| is an absolute value."""
    parts = line.split("`")
    return "`".join(part if number % 2 else part.replace("|", r"\|") for number, part in enumerate(parts))


def by_last_name(app, env, node, contnode):
    """Links a class by its module of definition to where it is described: under its package's name."""
    if node.get("refdomain") != "py" or not node["reftarget"].startswith("rftcore."):
        return None
    python = env.get_domain("py")
    last = "." + node["reftarget"].rpartition(".")[2]
    found = [
        entry[0] for entry in python.get_objects() if entry[0].endswith(last) and entry[2] in ("class", "exception")
    ]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode)
