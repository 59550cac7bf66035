"""The site is built without a warning, from pages and docstrings, and loads nothing from elsewhere."""

import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import molora_kernels
import pytest

import molora

REPOSITORY = Path(__file__).parents[1]
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == LOADED.get(tag) and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", "-d", str(out / ".doctrees"), ".", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr  # in a process of its own: autodoc loads modules a second time
    return out


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for target in Loads(page).found:
            assert not re.match(r"(\w+:)?//", target), (page, target)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(\w+:)?//", style.read_text()), style
    assert "docs/index.html" in (site / "index.html").read_text()


def test_the_reference_has_every_public_name(site: Path) -> None:
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    names = {line.split()[0] for line in listed.splitlines() if " py:" in line}
    homes = {name: f"molora.{module}.{name}" for module, some in molora._MODULES.items() for name in some}
    assert set(homes) == set(molora.__all__)
    wanted = set(homes.values()) | {f"molora_kernels.{name}" for name in molora_kernels.__all__}
    assert wanted <= names
    index = (site / "docs" / "api" / "index.html").read_text()
    assert all(f"#{home}" in index for home in homes.values())


def test_every_guide_is_in_the_navigation() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.stem == "index" or re.search(rf"^(.* <)?{page.stem}>?$", index, flags=re.MULTILINE), page


def test_types_are_shipped() -> None:
    for package in (molora, molora_kernels):
        assert (Path(package.__file__).parent / "py.typed").is_file()
