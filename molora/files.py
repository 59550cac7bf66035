"""Writing files and folders so that a reader sees the old contents or the new, never a part.

Everything is written beside its target and moved into place by a rename. What is written, and why, is the
business of the callers.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (a string as UTF-8) to `path`, replacing what was there in one step.

    Missing parent folders are made. After a crash `path` holds the old contents or the new ones.

    Raises:
        OSError: the file, which it names, cannot be written; `path` is then unchanged.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not say where
        raise
    _sync(path.parent)


def replace(source: Path, target: Path) -> None:
    """Put a written file in another one's place. After a crash `target` is the old one or the whole new one."""
    _sync(source)
    source.replace(target)
    _sync(target.parent)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it becomes `path`, else it is removed.

    Args:
        path: the folder to make or replace; missing parents are made, a symbolic link is followed.
        replace: what happens to a folder with contents that is at `path` when the block ends: True swaps it for
            the new one and removes it, False keeps it and drops the new one (the first of several writers wins).

    A folder cannot be exchanged in one portable step: a reader may for an instant find nothing at `path`, and a
    crash in that instant leaves the old folder whole, as `.NAME.HEX.old` beside it.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: the folder cannot be written; `path` is then unchanged.
    """
    path = path.resolve()
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file, and a folder is to be written there: move it or name another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        _move(temporary, path, replace=replace)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path, *, replace: bool) -> None:
    """Rename the folder `source` to `target`, whatever other processes rename there meanwhile."""
    olds: list[Path] = []
    try:
        while True:
            try:
                source.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if not replace:
                return
            old = _sibling(target, "old")
            with suppress(FileNotFoundError):
                target.rename(old)
                olds.append(old)
    except OSError:
        if olds and not target.exists():
            olds.pop().rename(target)
        raise
    finally:
        for old in olds:
            shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _sync(path: Path) -> None:
    """Bring a written file's bytes, or a folder's list of names, to the disk."""
    if os.name != "posix":  # other systems refuse to sync what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
