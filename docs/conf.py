"""The site: `python -m sphinx -W -c docs . build/site` takes the repository's pages from where they lie."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "MoLoRA"
author = "the authors of MoLoRA"
version = release = installed_version("molora")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "DESIGN.md",
    "banks/smollm2-demo/README.md",
    "benchmarks/results/scaling.md",
    "docs/**.md",
    "docs/**.rst",
    "kernels/README.md",
]

default_role = "py:obj"  # docstrings name things in single backticks: a link where the site has it, else code
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Activation", "Messages", "Route", "TokenRoute")}
add_module_names = False
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_heading_anchors = 3

html_theme = "furo"
html_title = "MoLoRA"
html_extra_path = ["_extra"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def _keep_angle_brackets(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """In single backticks reStructuredText reads `a <b>` as a link to b, named a."""
    lines[:] = [re.sub(r"(?<!`)`([^`]*<[^`]*)`(?!`)", r"``\1``", line) for line in lines]


def _name_aliases(
    _app: Any, _what: str, _name: str, _obj: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Autodoc leaves its own placeholder of an alias where it stands in a union."""
    alias = r"TypeAliasForwardRef\('(\w+)'\)"
    return signature and re.sub(alias, r"\1", signature), returns and re.sub(alias, r"\1", returns)


def _include(_app: Any, _name: str, source: list[str]) -> None:
    """What is included stands in comments, which those who read a page where it lies do not see."""
    source[0] = re.sub(r"<!-- site\n(.*?)\n-->", r"\1", source[0], flags=re.DOTALL)


def setup(app: Any) -> None:
    app.connect("source-read", _include)
    app.connect("autodoc-process-signature", _name_aliases)
    app.connect("autodoc-process-docstring", _keep_angle_brackets)
