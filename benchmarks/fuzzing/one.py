"""One target under libFuzzer, in a process of its own that may be killed by an input: `fuzz.py` starts it.

    python benchmarks/fuzzing/one.py "molora.json" FOLDER --seconds 60

What is found is written down, once for each place, and fuzzing goes on; what hangs ends the process.
"""

import argparse
import base64
import json
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["molora"]):
    from fuzzing import LIMIT_S, Target
    from fuzzing.mutation import mutated_json

MAX_GROWTH_MB = 512  # of memory, from the first inputs on
NUM_FIRST = 100
MAX_INPUT_BYTES = 4096
HANG_S = 30  # of wall time, which a busy machine stretches


class Run:
    """The state is in a file, because libFuzzer ends the process when its time is up."""

    def __init__(self, target: Target, state: Path) -> None:
        self._target, self._state = target, state
        self._found: dict[str, dict[str, Any]] = {}
        self._num_executions = self._num_accepted = 0
        self._base_mb = self._peak_mb = 0
        self._written_s = 0.0

    def __call__(self, made: bytes) -> None:
        self._num_executions += 1
        forget_peak()
        try:
            self._num_accepted += self._target.check(made)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._note(error, made)
        peak = peak_mb()
        self._peak_mb = max(self._peak_mb, peak)
        if self._num_executions <= NUM_FIRST:
            self._base_mb = self._peak_mb
        elif peak > self._base_mb + MAX_GROWTH_MB:
            self._note(MemoryError(f"{peak - self._base_mb} MB"), made)
        if time.monotonic() > self._written_s + 1:
            self.write()

    def _note(self, error: BaseException, made: bytes) -> None:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/molora/" in frame.filename]
        where = "" if not ours else f"{ours[-1].filename.rpartition('/molora/')[2]}:{ours[-1].name}"
        kind = type(error).__name__
        if (key := f"{kind} {where}") not in self._found:
            text = "".join(traceback.format_exception_only(error)).strip()[:300]
            entry = {"error": text, "where": where, "input": base64.b64encode(made).decode()}
            self._found[key] = entry
            self.write()

    def write(self) -> None:
        self._written_s = time.monotonic()
        state = {
            "executions": self._num_executions,
            "accepted": self._num_accepted,
            "peak_memory_mb": self._peak_mb,
            "first_memory_mb": self._base_mb,
            "found": list(self._found.values()),
        }
        part = self._state.with_suffix(".part")
        part.write_text(json.dumps(state))
        part.replace(self._state)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> int:
    """The most memory since `forget_peak`: making inputs up takes some, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("folder", type=Path, help="with `corpus` and, written here, `state.json`")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    scratch, corpus = args.folder / "scratch", args.folder / "corpus"
    scratch.mkdir()
    corpus.mkdir(exist_ok=True)
    target = Target.make(args.target, scratch)
    for index, seed in enumerate(target.seeds):
        (corpus / f"seed-{index:03}").write_bytes(seed)
    (args.folder / "words").write_text("\n".join(dictionary(target.seeds)) + "\n")
    options = {
        "max_total_time": args.seconds,
        "max_len": MAX_INPUT_BYTES,
        "timeout": HANG_S,
        "rss_limit_mb": 0,  # counted here
        "seed": args.seed,
        "dict": args.folder / "words",
        "artifact_prefix": f"{args.folder}/",
        "print_final_stats": 1,
    }
    assert LIMIT_S < HANG_S
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (4 << 30),) * 2)  # a MemoryError before the machine suffers
    arguments = ["fuzz", str(corpus), *(f"-{name}={value}" for name, value in options.items())]
    atheris.Setup(arguments, Run(target, args.folder / "state.json"), custom_mutator=mutate)
    atheris.Fuzz()


def mutate(made: bytes, max_bytes: int, seed: int) -> bytes:
    """By libFuzzer's own ways, or, where it is JSON, as often as JSON; a first byte may say how to read the rest."""
    draw = Random(seed)
    if draw.random() < 0.6:
        for begin in (0, 1):
            changed = mutated_json(made[begin:], draw)
            if changed is not None and begin + len(changed) <= max_bytes:
                return made[:begin] + changed
    mutated: bytes = atheris.Mutate(made, max_bytes)
    return mutated


def dictionary(seeds: tuple[bytes, ...]) -> list[str]:
    """Words of JSON seeds, as libFuzzer reads them, for it to put into others."""
    words = {'"', "{", "}", "[", "]", "null", "true", "1e999", "-1", "99999999999999999999", "\\\\u0000", "\\\\ud800"}

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            words.update(json.dumps(key) for key in value)
            for each in value.values():
                collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)
        else:
            words.add(json.dumps(value))

    for seed in seeds:
        try:
            collect(json.loads(seed))
        except (ValueError, RecursionError):
            words.add(json.dumps(seed[:20].decode("latin-1")))
    escaped = {"".join(f"\\x{byte:02x}" for byte in word.encode()) for word in words if len(word) < 60}
    return [f'"{word}"' for word in sorted(escaped) if word]


if __name__ == "__main__":
    main()
