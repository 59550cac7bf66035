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
from huggingface_hub.utils._paths import filter_repo_objects

from molora.bank import BANK_FILE, ROUTER_FILE, Bank, is_hub_name
from molora.display import one_line
from molora.files import atomic_directory

CARD = "README.md"
PATTERNS = ["*.json", "*.safetensors", "*.md", "*.png", "LICENSE*"]
OWN = [BANK_FILE, ROUTER_FILE, "adapters/*"]  # what a push removes if the bank has it no more


def push(bank: Bank, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Make the repository if there is none, and write the bank to it in one commit.

    Adapters that the bank no longer has are removed there; files outside `adapters/` are left alone. A bank without a
    card (README.md) gets a generated one, there and not in its folder.

    Args:
        repo: such as "someone/my-bank"; without an owner it is the account's.
        private: of a new repository; None is the account's default.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: the name is none of a repository, a private one was asked for and is there and public, the bank
            holds links, or a file is not what the bank says.
        PermissionError: nobody is logged in, or may not write there.
        ConnectionError: the hub cannot be reached.
    """
    bank.check()
    if links := [path for path in bank.path.rglob("*") if path.is_symlink()]:
        raise ValueError(f"{links[0]} is a link; put what it leads to in its place, or remove it.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bank"
        _copy(bank.path, folder)
        if not (folder / CARD).exists():
            (folder / CARD).write_text(card(bank), encoding="utf-8")
        with _explained(repo):
            api = HfApi()
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
            is_public = bool(private) and not api.repo_info(name).private
        if is_public:
            raise ValueError(f"{name} is there already, and is public; make it private first, or name another one.")
        with _explained(repo):
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
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
        _copy(fetched, written)
        try:
            Bank.open(written).check()
        except FileNotFoundError as error:
            what = one_line(error).replace(str(written), repo)
            raise ValueError(f"a file is missing, on the hub or in its local cache; pull it online: {what}") from error
        except ValueError as error:
            what = one_line(error).replace(str(written), repo)
            raise ValueError(f"{repo} on the hub is damaged: {what}") from error
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


def _copy(source: Path, target: Path) -> None:
    """What a bank is made of, and no hidden file; links of the hub's cache become files."""
    paths = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    seen = [path for path in paths if not any(part.startswith(".") for part in Path(path).parts)]
    for path in filter_repo_objects(seen, allow_patterns=PATTERNS):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


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
    except Exception as error:  # the hub's client raises its HTTP library's errors, which differ between versions
        if getattr(error, "errno", None):
            raise  # the disk's
        raise ConnectionError(f"the hub cannot be reached ({one_line(error)})") from error
