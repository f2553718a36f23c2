"""Configuration of the documentation site; `make docs` builds it."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import mmbal_fast

project = "mmbal_fast"
author = "mmbal_fast contributors"
copyright = f"2026, {author}"
release = mmbal_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
nitpicky = True  # what looks like a name is one that exists
nitpick_ignore_regex = [
    ("py:.*", r"(lightning|transformers)\..*"),
    ("py:.*", r"(.*\.)?_\w+"),  # private
    # Types that the docstrings spell out.
    ("py:.*", r"(.*\.)?(Stateful|ScalarWriter|MappingLogger|MethodCallback)"),
    ("py:.*", r"(.*\.)?(Encode|FusionModel|Parameters|Select|T)"),
]

html_theme = "furo"
html_title = f"mmbal_fast {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
default_role = "py:obj"  # docstrings put names between single backticks

# Only the names that the docstrings and signatures use, so that no build needs a network.
INVENTORIES = Path(__file__).parent / "inventories"
intersphinx_mapping = {
    "matplotlib": ("https://matplotlib.org/stable/", str(INVENTORIES / "matplotlib.inv")),
    "python": ("https://docs.python.org/3/", str(INVENTORIES / "python.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable/", str(INVENTORIES / "torch.inv")),
}
OTHERS = [
    line.split()[0]
    for path in sorted(INVENTORIES.glob("*.inv"))
    for line in path.read_text().splitlines()
    if not line.startswith("#")
]


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Finds what a docstring or a signature calls by a shorter or a private name.

    `step` of a class, `Tensor` imported for types only, `mmbal_fast.methods.ogm_ge.OGMGE`: the
    public name that ends in it, the shortest first.
    """
    if node.get("refdomain") != "py":
        return None
    python = env.domains.python_domain
    target = node["reftarget"]
    endings = [target]
    if node["reftype"] != "obj":  # a type, whose module may be private
        parts = target.split(".")
        endings = [".".join(parts[first:]) for first in range(len(parts))]
    names = [*python.objects, *OTHERS]
    for ending in endings:
        found = [name for name in names if f".{name}".endswith(f".{ending}")]
        if found:
            node["reftarget"] = min(found, key=lambda name: (name.count("."), name))
            return python.resolve_xref(
                env, node["refdoc"], app.builder, "obj", node["reftarget"], node, contnode
            )  # None for a name of another project: intersphinx is asked next
    return None


def start_with_readme(app: Sphinx, docname: str, content: list[str]) -> None:
    """The README is the start page; its links count from the root of the repository."""
    if docname == "index":
        readme = (Path(__file__).parents[1] / "README.md").read_text()
        for there, here in (("](docs/", "]("), ("](CONTRIBUTING.md", "](contributing.md")):
            readme = readme.replace(there, here)
        content[0] = readme + "\n" + content[0]


def no_type_before_a_colon(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keeps napoleon from taking the sentence before a colon for the type of an attribute."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment, which holds no colon


def skip_field_numbers(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leaves out what Python writes about the fields of a named tuple; the class documents them."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Registers the above."""
    app.connect("autodoc-process-docstring", no_type_before_a_colon, priority=400)  # napoleon: 500
    app.connect("autodoc-skip-member", skip_field_numbers)
    app.connect("missing-reference", resolve_short_name, priority=400)  # intersphinx has 500
    app.connect("source-read", start_with_readme)
