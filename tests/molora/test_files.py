import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from molora.files import atomic_directory, write_atomic


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("data", [b"\x00new", "new é"])
def test_write_atomic_replaces_a_file_and_leaves_nothing_else(tmp_path, data):
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")
    write_atomic(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert names(path.parent) == {"file"}


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("molora.files.os.fsync", full)
    with pytest.raises(OSError, match="no space") as caught:
        write_atomic(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_write_atomic_writes_through_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "x"


def test_directory_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "bank"
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert folder.parent == target.parent
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert names(target.parent) == {"bank"}


@pytest.mark.parametrize("replace", [True, False])
def test_directory_swaps_or_keeps_an_existing_one(tmp_path, replace):
    target = tmp_path / "bank"
    target.mkdir()
    (target / "old").touch()
    with atomic_directory(target, replace=replace) as folder:
        (folder / "new").touch()
    assert names(target) == {"new" if replace else "old"}
    assert names(tmp_path) == {"bank"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_directory_is_unchanged_on_failure(tmp_path, error, existing):
    target = tmp_path / "bank"
    if existing:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), atomic_directory(target) as folder:  # noqa: PT012
        (folder / "new").touch()
        raise error
    assert names(tmp_path) == ({"bank"} if existing else set())
    assert not existing or names(target) == {"old"}


def test_directory_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    target = tmp_path / "bank"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def failing(self, other):
        if self.suffix == ".tmp" and not target.exists():
            raise PermissionError("not now")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError, match="not now"), atomic_directory(target) as folder:
        (folder / "new").touch()
    assert names(target) == {"old"}
    assert names(tmp_path) == {"bank"}


def test_directory_refuses_a_file(tmp_path):
    target = tmp_path / "bank"
    target.touch()
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_directory(target):
        pass


def test_writers_at_once_leave_one_whole_directory(tmp_path):
    target = tmp_path / "bank"

    def write(number: int) -> None:
        with atomic_directory(target) as folder:
            for name in "ab":
                (folder / name).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    assert len({(target / name).read_text() for name in "ab"}) == 1
    assert names(tmp_path) == {"bank"}
