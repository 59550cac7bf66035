"""The fuzzer's targets on inputs that Hypothesis makes up: each is read, or refused by a documented error, in time.

`benchmarks/fuzz.py` looks further, guided by the code that is reached.
"""

import warnings
from collections.abc import Callable
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUM_EXAMPLES = 60
NAMES = ["adapter_config.json", "adapter_model.safetensors", "molora.json", "router.safetensors"]
NAMES += ["a base's safetensors", "chat messages", "grammars"]


@pytest.fixture(scope="module")
def make_target(benchmark_module: Callable[[str], ModuleType], tmp_path_factory: Any) -> Callable[[str], Any]:
    return lambda name: benchmark_module("fuzzing").Target.make(name, tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_tested(benchmark_module: Callable[[str], ModuleType]) -> None:
    assert list(benchmark_module("fuzzing").TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_made_up_is_read_or_refused(
    name: str, make_target: Callable[[str], Any], benchmark_module: Callable[[str], ModuleType]
) -> None:
    target, mutated_json = make_target(name), benchmark_module("fuzzing.mutation").mutated_json
    num_accepted = 0

    def check(made: bytes) -> None:
        nonlocal num_accepted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about what a base's files hold
            num_accepted += target.check(made)

    for seed in target.seeds:
        check(seed)
    assert num_accepted > 1
    assert num_accepted < len(target.seeds)

    @settings(max_examples=NUM_EXAMPLES, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(target.seeds), st.integers(0, 1 << 30), st.binary(max_size=20))
    def search(seed: bytes, number: int, some: bytes) -> None:
        begin = 0 if seed.startswith(b"{") else 1
        changed = mutated_json(seed[begin:], Random(number))
        check(seed[: number % (len(seed) + 1)] + some if changed is None else seed[:begin] + changed)

    search()


def test_a_target_notices_what_is_not_documented(
    make_target: Callable[[str], Any], benchmark_module: Callable[[str], ModuleType]
) -> None:
    target = make_target("chat messages")
    object.__setattr__(target, "read", lambda made: {}["x"])
    with pytest.raises(KeyError):
        target.check(b"")
    module = benchmark_module("fuzzing")
    object.__setattr__(target, "read", lambda made: sum(range(1_000_000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIMIT_S", 1e-6)
        with pytest.raises(module.SlowError):
            target.check(b"")
