"""A bank as one repository of the Hugging Face hub: push it with a card, pull it as a whole.

Only what a bank is made of travels: JSON, safetensors, Markdown and pictures. What is pulled is checked, every digest,
before it takes its place; from then on it is a folder like any other, and the hub is not asked again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from molora.bank import BANK_FILE, Bank, is_hub_name
from molora.display import one_line
from molora.files import atomic_directory

CARD = "README.md"
PATTERNS = ["*.json", "*.safetensors", "*.md", "*.png", "LICENSE*"]
OWN = [BANK_FILE, "*.safetensors", "adapters/*"]  # files of earlier versions that a push removes


def push(bank: Bank, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Make the repository if there is none, and write the bank to it in one commit.

    Adapters that the bank no longer has are removed there; other files are left alone. A bank without a card
    (README.md) gets a generated one, there and not in its folder.

    Args:
        repo: such as "someone/my-bank".
        private: of a new repository; None is the account's default.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: the name is none of a repository, or an adapter's files are not what the bank says.
        PermissionError: nobody is logged in, or may not write there.
        ConnectionError: the hub cannot be reached.
    """
    _check(bank)
    with _explained(repo), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bank"
        shutil.copytree(bank.path, folder, ignore=shutil.ignore_patterns(".*"))
        if not (folder / CARD).exists():
            (folder / CARD).write_text(card(bank), encoding="utf-8")
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=PATTERNS,
            delete_patterns=OWN,
            commit_message=message or f"The bank {bank.name}, {len(bank)} adapters",
        )
    return commit.commit_url


def pull(repo: str, folder: str | Path, *, revision: str | None = None) -> Bank:
    """Fetch a bank into a folder; what the hub's local cache holds is not fetched again.

    Args:
        revision: a branch, tag or commit; None is the main branch.

    Raises:
        FileExistsError: the folder is there already, with something in it.
        FileNotFoundError: there is no such repository or revision.
        PermissionError: it is gated, and access was not granted.
        ValueError: it holds no bank, or its files are not what the bank says; nothing was written.
        ConnectionError: the hub cannot be reached, and the local cache does not hold the bank.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; remove it, or name another folder.")
    with _explained(repo):
        fetched = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    if not (fetched / BANK_FILE).is_file():
        raise ValueError(f"{repo} on the hub is no bank: it has no {BANK_FILE}.")
    with atomic_directory(folder) as written:
        shutil.copytree(fetched, written, dirs_exist_ok=True)  # links of the cache become files
        try:
            _check(Bank.open(written))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{repo} on the hub is damaged: {one_line(error).replace(str(written), repo)}") from error
    return Bank.open(folder)


def card(bank: Bank) -> str:
    """A model card of what the bank says of itself, in the hub's format."""
    config = bank.config
    named = [f"base_model: {config.base.name}"] if is_hub_name(config.base.name) else []
    head = ["---", *named, "library_name: molora", "tags:", "- lora", "- molora", "---"]
    rows = [
        f"| `{entry.name}` | {bank.load_adapter(entry.name).max_rank} | {entry.activation} | "
        f"{'yes' if entry.routable else 'no'} | {entry.digest.rpartition(':')[2][:12]} |"
        for entry in bank.adapters
    ]
    router = (
        f"A router at layer {config.router_layer} picks an adapter, or none, for every token."
        if bank.has_router
        else "It has no router: requests name an adapter."
    )
    lines = [
        *head,
        "",
        f"# {bank.name}",
        "",
        f"A bank of {len(bank)} activated LoRA adapters over `{config.base.name}`. {router}",
        "",
        "| adapter | rank | active from | routable | digest |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"The base's weights have the digest `{config.base.digest}`.",
        "",
        "```python",
        "import molora",
        "",
        f'm = molora.load("{bank.name}")  # a folder, as `molora bank pull` writes it',
        'print(m.generate([{"role": "user", "content": "..."}]).text)',
        "```",
        "",
        "Each folder under `adapters/` is a PEFT adapter, too.",
    ]
    return "\n".join(lines) + "\n"


def _check(bank: Bank) -> None:
    """Read every file of a bank, and compare it with its digest."""
    for entry in bank.adapters:
        bank.load_adapter(entry.name)
    bank.load_router()


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The hub's errors as those that a user can act on."""
    try:
        yield
    except HFValidationError:
        raise ValueError(f"{repo!r} is no name of a repository; expected one such as someone/my-bank.") from None
    except GatedRepoError as error:
        raise PermissionError(f"{repo} is gated: accept its terms on its page, then run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on the hub has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} is not on the hub, or is private: check the spelling, or run `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"the hub cannot be reached, and {repo} is not in its local cache.") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(f"the hub does not let you write to {repo}: run `hf auth login`.") from error
        raise ConnectionError(f"the hub did not do it: {one_line(error)}") from error
