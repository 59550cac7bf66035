"""What CI installs is locked by hashes, is what pyproject.toml asks for, and is no release known to be malicious."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = (ROOT / ".ci" / "wheels.lock", ROOT / ".ci" / "sources.lock")
ENTRY = re.compile(r"(?P<requirement>[^\s\\#][^\\\n]*)(?P<hashes>( \\\n +--hash=sha256:[0-9a-f]{64})+)\n")
MALICIOUS = ("lightning==2.6.2", "lightning==2.6.3", "ultralytics==8.3.41", "ultralytics==8.3.42")
PYTHONS = ("3.11", "3.12")


def locked(python):
    """Versions by name."""
    found = {}
    for lock in LOCKS:
        for match in ENTRY.finditer(lock.read_text()):
            requirement = Requirement(match["requirement"].strip())
            environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                (version,) = requirement.specifier
                assert version.operator == "=="
                assert requirement.name not in found
                found[canonicalize_name(requirement.name)] = version.version
    return found


def wanted():
    """What the project's own extra "dev" asks for, the extras in it included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == "molora":
            todo += [each for extra in requirement.extras for each in project["optional-dependencies"][extra]]
        else:
            yield requirement


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_each_line_is_a_version_with_hashes(lock):
    comment, *_ = text = lock.read_text().splitlines(keepends=True)
    assert comment.startswith("#")
    assert ENTRY.sub("", "".join(text[1:])) == ""


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_the_project_asks_for(python):
    versions, requirements = locked(python), list(wanted())
    assert len(requirements) > 25
    for requirement in requirements:
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}; run .ci/lock"


def test_no_malicious_release_is_locked_or_allowed():
    allowed = {requirement.name: requirement.specifier for requirement in wanted()}
    for name, version in (release.split("==") for release in MALICIOUS):
        assert all(locked(python).get(name) != version for python in PYTHONS)
        assert name not in allowed or not allowed[name].contains(version)


def test_nothing_is_fetched_after_the_lock_is_installed():
    script = (ROOT / ".ci" / "run").read_text()
    before, _, after = script.partition("pip install --quiet --no-index -e")
    assert before.count("--require-hashes --no-deps") == 1
    assert "--only-binary :all: -r .ci/wheels.lock" in before
    assert after.index(".ci/audit") < after.index("pytest")
