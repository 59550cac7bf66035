"""Banks on the hub: what is pushed is pulled again, through the hub's own client and a small hub of our own."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner

from molora import hub
from molora.bank import Bank
from molora.cli import app
from molora.hub import card, pull, push

OWNER = "someone"
REPO = f"{OWNER}/my-bank"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> commits, each of files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.refuses_writing = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.repos[REPO][-1]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.server.refuses_writing:
            return self.answer(403, {"error": "no"})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made.get('organization') or OWNER}/{made['name']}"
            if repo in self.server.repos:
                return self.answer(409, {"url": f"{self.server.url}/{repo}"})
            self.server.repos[repo] = [{}]
            if made.get("private") or made.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer(200, {"url": f"{self.server.url}/{repo}"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if f"/{REPO}/commit/" in self.path:
            commits = self.server.repos[REPO]
            files = dict(commits[-1])
            for line in body.splitlines():
                each = json.loads(line)
                if each["key"] == "file":
                    files[each["value"]["path"]] = base64.b64decode(each["value"]["content"])
                elif each["key"] == "deletedFile":
                    del files[each["value"]["path"]]
            commits.append(files)
            sha = _sha(len(commits) - 1)
            url = f"{self.server.url}/{REPO}/commit/{sha}"
            return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return self.answer(200 if self.path.endswith("/validate-yaml") else 404, {})

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        commits = self.server.repos.get(REPO) if f"/{REPO}/" in f"{path}/" else None
        if path.startswith("/api/models/") and commits is not None:
            revision = (
                path.partition("/revision/")[2].partition("/")[0] or path.partition("/tree/")[2].partition("/")[0]
            )
            number = _number(revision or "main", commits)
            if number is None:
                return self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            files = commits[number]
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(200, tree)
            siblings = [{"rfilename": name} for name in files]
            about = {"id": REPO, "sha": _sha(number), "siblings": siblings, "private": REPO in self.server.private}
            return self.answer(200, about)
        if "/resolve/" in path and commits is not None:
            revision, _, name = path.partition("/resolve/")[2].partition("/")
            number = _number(revision, commits)
            if number is not None and name in commits[number]:
                data = commits[number][name]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.answer(200, data, ETag=etag, X_Repo_Commit=_sha(number), Accept_Ranges="bytes")
            return self.answer(404, {"error": "no entry"}, X_Error_Code="EntryNotFound")
        return self.answer(404, {"error": "no repo"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def _sha(number: int) -> str:
    return f"{number:040x}"


def _number(revision: str, commits: list[Any]) -> int | None:
    if revision == "main":
        return len(commits) - 1
    numbers = {_sha(number): number for number in range(len(commits))}
    return numbers.get(revision)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=server.url, token="hf_token"))
    fetch = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: fetch(*a, endpoint=server.url, cache_dir=tmp_path / "hub cache", **k)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bank(tmp_path: Path, make_bank: Callable[..., Bank], key_router: Callable[..., Any]) -> Bank:
    made = make_bank(tmp_path / "bank", router=key_router())
    (made.path / "results").mkdir()
    (made.path / "results" / "heldout.json").write_text("{}")
    (made.path / "weights.bin").write_bytes(b"pickled")
    (made.path / ".secret.json").write_text("{}")
    return made


def with_another_bit(data: bytes) -> bytes:
    """Of the last number's mantissa."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_pulled(server: Hub, bank: Bank, tmp_path: Path) -> None:
    pushed = CliRunner().invoke(app, ["bank", "push", str(bank.path), REPO, "--private"])
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.strip().endswith(_sha(1))
    assert server.private == {REPO}
    assert not {"weights.bin", ".secret.json"} & set(server.files)
    pulled = CliRunner().invoke(app, ["bank", "pull", REPO, str(tmp_path / "pulled")])
    assert pulled.exit_code == 0, pulled.output
    assert "2 adapters" in pulled.stdout
    wanted = contents(bank.path)
    del wanted["weights.bin"], wanted[".secret.json"]
    found = contents(tmp_path / "pulled")
    assert f"A bank of {len(bank)} activated LoRA adapters" in found.pop("README.md").decode()
    assert found == wanted
    assert not (bank.path / "README.md").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "pulled").rglob("*"))


def test_a_name_without_an_owner_is_the_users_own(server: Hub, bank: Bank) -> None:
    url = hub.push(bank, REPO.removeprefix(f"{OWNER}/"))
    assert url.endswith(f"/{REPO}/commit/{_sha(1)}")
    assert list(server.repos) == [REPO]
    assert "molora.json" in server.files


def test_a_push_removes_what_the_bank_has_no_more_and_nothing_else(server: Hub, bank: Bank, tmp_path: Path) -> None:
    push(bank, REPO)
    server.repos[REPO][-1]["notes.md"] = b"kept"
    (bank.path / "README.md").write_text("my own card")
    bank.remove(bank.adapters[-1].name)
    push(bank, REPO)
    assert server.files["README.md"] == b"my own card"
    assert server.files["notes.md"] == b"kept"
    assert {path.split("/")[1] for path in server.files if path.startswith("adapters/")} == {bank.adapters[0].name}
    older = pull(REPO, tmp_path / "older", revision=_sha(1))
    assert len(older) == len(pull(REPO, tmp_path / "newer")) + 1
    with pytest.raises(FileNotFoundError, match="no such revision"):
        pull(REPO, tmp_path / "never", revision="v9")


def test_what_is_damaged_on_the_way_is_not_taken(server: Hub, bank: Bank, tmp_path: Path) -> None:
    push(bank, REPO)
    path = next(path for path in server.files if path.endswith("adapter_model.safetensors"))
    server.files[path] = with_another_bit(server.files[path])
    with pytest.raises(ValueError, match=f"{REPO} on the hub is damaged: adapter 'x' .*digest"):
        pull(REPO, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir() if "pulled" in path.name] == []
    server.repos[REPO].append({path: data for path, data in server.files.items() if path != "molora.json"})
    with pytest.raises(ValueError, match=r"is no bank: it has no molora\.json"):
        pull(REPO, tmp_path / "pulled")


def test_from_the_cache_when_the_hub_is_away(server: Hub, bank: Bank, tmp_path: Path) -> None:
    push(bank, REPO)
    pull(REPO, tmp_path / "first")
    server.shutdown()
    server.server_close()
    assert contents(pull(REPO, tmp_path / "second").path) == contents(tmp_path / "first")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        pull("someone/other", tmp_path / "third")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        push(bank, REPO)
    (snapshot,) = (tmp_path / "hub cache").rglob("snapshots/*")
    for name in ("pytorch_model.bin", "evil.py", ".hidden.json"):
        (snapshot / name).write_text("{}")
    assert contents(pull(REPO, tmp_path / "fourth").path) == contents(tmp_path / "first")
    next(snapshot.rglob("adapter_model.safetensors")).unlink()
    with pytest.raises((ValueError, ConnectionError), match=r"in its local cache|is incomplete"):
        pull(REPO, tmp_path / "fifth")


def test_mistakes_are_explained(server: Hub, bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not on the hub, or is private"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(ValueError, match="is no name of a repository"):
        push(bank, "a/b/c")
    with pytest.raises(FileExistsError, match="is there already"):
        pull(REPO, bank.path)
    (bank.path / "elsewhere.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="is a link"):
        push(bank, REPO)
    (bank.path / "elsewhere.json").unlink()
    server.repos[REPO] = [{}]
    with pytest.raises(ValueError, match="is public"):
        push(bank, REPO, private=True)
    assert server.repos.pop(REPO) == [{}]
    server.refuses_writing = True
    with pytest.raises(PermissionError, match="hf auth login"):
        push(bank, REPO)
    weights = bank.adapter_folder(bank.adapters[0].name) / "adapter_model.safetensors"
    weights.write_bytes(with_another_bit(weights.read_bytes()))
    with pytest.raises(ValueError, match="digest"):
        push(bank, REPO)


def test_a_card_says_what_the_bank_says(bank: Bank) -> None:
    text = card(bank)
    assert text.startswith("---\n")
    for entry in bank.adapters:
        assert f"| `{entry.name}` |" in text
    assert bank.config.base.digest in text
