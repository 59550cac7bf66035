"""Where text of several domains lies on every machine: Python's own files, and what its packages bring along.

A source is a file (of docstrings, a module) in blocks that can stand alone: functions, paragraphs, messages. Nothing
is imported or run. What is found depends on the versions of Python and of the packages.
"""

import ast
import hashlib
import re
import struct
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackagePath, distributions
from itertools import groupby
from pathlib import Path

from molora.training.recipes.documents import documents, source_files

LANGUAGES = {"cs", "da", "de", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv", "tr"}

MAX_CHARS = 350  # of a block
MIN_WORDS = 13  # of a block, but for messages
MIN_MESSAGE_WORDS = 4

_LEGAL = re.compile("licen[cs]e|copying|copyright|notice", re.IGNORECASE)
_LITTLE_ENDIAN = b"\xde\x12\x04\x95"


@dataclass(frozen=True)
class Source:
    """A file's name, from the library's or the packages' folder, and its blocks in order."""

    name: str
    blocks: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(self.blocks).encode()).hexdigest()


def python_code() -> Iterator[Source]:
    """Functions and methods of the standard library that have no docstring, so that code is all there is."""
    library = Path(sysconfig.get_path("stdlib"))
    for _, path in source_files():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # as ast counts them
        blocks = []
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is None:
                first = min(part.lineno for part in (node, *node.decorator_list))
                block = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                # A string whose lines begin at the margin keeps the rest from going there.
                if len(block) <= MAX_CHARS and _num_words(block) >= MIN_WORDS and not block[0].isspace():
                    blocks.append(block)
        yield Source(path.relative_to(library).as_posix(), tuple(blocks))


def prose() -> Iterator[Source]:
    """Docstrings of the standard library in plain sentences."""
    found = sorted(documents(), key=lambda document: document.module)
    for module, group in groupby(found, lambda document: document.module):
        blocks = [block for document in group for block in _wrapped(f"{document.summary} {document.body}")]
        yield Source(module, tuple(blocks))


def legal_texts() -> Iterator[Source]:
    """Paragraphs of the licences and notices that packages bring."""

    def is_legal(file: PackagePath) -> bool:
        folder, *names = file.parts
        return ".dist-info" in folder and bool(_LEGAL.search("/".join(names))) and "AUTHORS" not in file.name

    for file in _packaged_files(is_legal):
        paragraphs = re.split(r"\n\W*\n", _decoded(file.read_binary()))
        yield Source(file.as_posix(), tuple(block for paragraph in paragraphs for block in _wrapped(paragraph)))


def messages() -> Iterator[Source]:
    """What programs say in `LANGUAGES`: translations in the catalogues of packages."""

    def is_catalogue(file: PackagePath) -> bool:
        return file.suffix == ".mo" and "LC_MESSAGES" in file.parts and not LANGUAGES.isdisjoint(file.parts)

    for file in _packaged_files(is_catalogue):
        found = (" ".join(text.split()) for text in read_catalogue(file.read_binary()))
        blocks = tuple(text for text in found if len(text) <= MAX_CHARS and len(text.split()) >= MIN_MESSAGE_WORDS)
        yield Source(file.as_posix(), blocks)


def read_catalogue(data: bytes) -> list[str]:
    """The translations of a compiled catalogue (GNU gettext's .mo) in UTF-8, of plurals the first form."""
    order = "<" if data.startswith(_LITTLE_ENDIAN) else ">"
    _, _, num_texts, _, table = struct.unpack_from(f"{order}5I", data)
    spans = struct.iter_unpack(f"{order}2I", data[table : table + 8 * num_texts])
    _header, *texts = (_decoded(data[start : start + length]).split("\0")[0] for length, start in spans)
    return texts


def _packaged_files(is_wanted: Callable[[PackagePath], bool]) -> list[PackagePath]:
    """Those that are there, by name; of a hundred thousand that are installed, only what is wanted is looked for."""
    files = {file.as_posix(): file for found in distributions() for file in found.files or () if is_wanted(file)}
    return [file for _, file in sorted(files.items()) if Path(file.locate()).is_file()]


def _wrapped(paragraph: str) -> list[str]:
    plain = re.sub(r"\s[\s*#]*", " ", paragraph.strip(" *#"))
    return [block for block in textwrap.wrap(plain, MAX_CHARS) if _num_words(block) >= MIN_WORDS]


def words(text: str) -> list[str]:
    """What is left of a text when layout, punctuation and case are gone."""
    return re.findall(r"\w+", text.lower())


def _num_words(text: str) -> int:
    return len(words(text))


def _decoded(data: bytes) -> str:
    return data.decode(errors="replace")
