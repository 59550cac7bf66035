"""Real text that no adapter answers: docstrings of Python's standard library, read from its source files.

Nothing is imported or run. What is found depends on the version of Python.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "_collections_abc _pydecimal _pyio argparse ast asyncio base64 bdb bz2 calendar cmd code codecs collections "
    "compileall concurrent configparser contextlib copy copyreg csv ctypes dataclasses datetime dbm difflib dis "
    "doctest email encodings enum fileinput fractions ftplib functools getopt getpass gettext glob graphlib gzip "
    "heapq hmac html http imaplib importlib inspect ipaddress json linecache locale logging lzma mimetypes "
    "multiprocessing netrc numbers os pathlib pdb pickle pickletools pkgutil platform poplib posixpath pprint "
    "pyclbr pydoc queue quopri random re sched secrets selectors shelve shlex shutil site smtplib socket "
    "socketserver sqlite3 ssl statistics string subprocess symtable sysconfig tabnanny tempfile textwrap threading "
    "timeit tkinter tokenize tomllib trace traceback tracemalloc turtle typing unittest urllib uuid venv warnings "
    "weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo"
)

_PUBLIC_NAMES = {"_collections_abc": "collections.abc", "_pydecimal": "decimal", "_pyio": "io"}

MIN_BODY_WORDS, MAX_BODY_WORDS = 15, 120
MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS = 4, 20

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """A docstring in two: its first line, and the prose after it, cut where a sentence ends."""

    module: str
    summary: str
    body: str

    @property
    def num_words(self) -> int:
        return len(self.body.split())


def documents() -> list[Document]:
    """Every docstring of `MODULES` with a one-sentence summary and enough prose; no summary and no body twice."""
    found: list[Document] = []
    seen: set[str] = set()
    for module, docstring in _docstrings():
        summary, *paragraphs = re.split(r"\n\s*\n", docstring)
        document = Document(module, " ".join(summary.split()), _body(paragraphs))
        if _suits(document) and seen.isdisjoint((document.summary, document.body)):
            seen |= {document.summary, document.body}
            found.append(document)
    return found


def source_files() -> Iterator[tuple[str, Path]]:
    """The files of `MODULES`, tests aside, each after its module's name."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES.split():
        folder = library / module
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            if path.is_file() and "test" not in path.relative_to(library).parts[1:]:
                yield module, path


def _docstrings() -> Iterator[tuple[str, str]]:
    for module, path in source_files():
        for docstring in _below(ast.parse(path.read_bytes())):
            yield _PUBLIC_NAMES.get(module, module), docstring


def _below(node: _Documented) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _below(child)


def _body(paragraphs: list[str]) -> str:
    """The first run of paragraphs in plain prose, up to the last sentence that fits."""
    prose: list[str] = []
    for paragraph in paragraphs:
        if re.search(r"^\W|>>>|::|\n\s", paragraph):  # an example, a list or a field
            break
        prose.append(" ".join(paragraph.split()))
    body = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(prose)):
        if len(body.split()) + len(sentence.split()) > MAX_BODY_WORDS:
            break
        body = f"{body} {sentence}".lstrip()
    return body


def _suits(document: Document) -> bool:
    return (
        MIN_SUMMARY_WORDS <= len(document.summary.split()) <= MAX_SUMMARY_WORDS
        and document.num_words >= MIN_BODY_WORDS
        and document.summary not in document.body
        and document.summary.endswith(".")
        and document.body.endswith(".")
        and document.summary.isascii()
        and document.body.isascii()
    )
