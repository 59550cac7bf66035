"""What a row was measured on: which files, by their contents, and which options; so that a stale row is known."""

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SINGLES = "data/singles.jsonl"  # what the table reads beside the rows


def provenance(args: Namespace, files: Iterable[str], options: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The digests of files, by their paths in the folder of work (None where there is none), and the options."""
    return {
        "files": {name: _digest(args.work / name) for name in sorted(files)},
        "options": {name: getattr(args, name) for name in sorted(options)},
    }


def check_alike(args: Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows without provenance cannot be checked.

    Raises:
        SystemExit: a file or an option was not the same for all rows that depend on it.
    """
    known: dict[str, tuple[Any, str]] = {SINGLES: (_digest(args.work / SINGLES), "what is there now")}
    for row in rows:
        of, who = row.get("of", {"files": {}, "options": {}}), f"{row['label']!r} of seed {row['seed']}"
        for name, value in {**of["files"], **of["options"]}.items():
            expected, other = known.setdefault(name, (value, who))
            if value != expected:
                raise SystemExit(f"the row {who} and {other} differ in {name}; run the stage eval again for both.")


def _digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
