"""Tenants of different salts: whether one has sent a prompt shows another neither in counts nor in time."""

import random
import time

import pytest

from molora.generation import Sampling
from molora.serving.engine import Engine, EngineConfig
from molora.serving.request import Request

NUM_ROUNDS = 40
NUM_TOKENS = 600
FAR = 14  # rounds from the half: by chance once in 100,000 tests, as (NUM_ROUNDS ** 0.5 / 2) is a deviation


@pytest.fixture
def ask(m):
    """Sends a prompt, and says what the engine counted for it and how many seconds it took to the first token."""
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24))

    def ask(prompt, salt, route="base"):
        request = Request(
            prompt=prompt, route=route, activation=NUM_TOKENS // 2, salt=salt, sampling=Sampling(max_new_tokens=1)
        )
        begun_s = time.perf_counter()
        (result,) = engine.generate([request])
        seconds = time.perf_counter() - begun_s
        return (result.num_reused_tokens, result.num_computed_tokens, result.num_reencoded_tokens), seconds

    yield ask
    engine.close()


@pytest.mark.parametrize("route", ["base", "auto", "x"])
def test_what_is_counted_is_that_of_a_prompt_that_nobody_sent(ask, random_ids, route):
    sent, never = random_ids(NUM_TOKENS, seed=1), random_ids(NUM_TOKENS, seed=2)
    ask(sent, "tenant", route)
    counts, _ = ask(sent, "another", route)
    assert counts == ask(never, "another", route)[0]
    assert counts[:2] == (0, NUM_TOKENS)
    assert ask(sent, "tenant", route)[0][1] < NUM_TOKENS / 10


def test_nor_can_it_be_told_from_the_time(ask, random_ids):
    """A sign test over pairs that are taken in turns, so that whatever else the machine does falls on both."""
    order = random.Random(0)
    other = random_ids(NUM_TOKENS, seed=1)
    num_sooner = {"of another salt": 0, "of its salt": 0}
    for number in range(NUM_ROUNDS):
        sent, never = (random_ids(NUM_TOKENS, seed=1000 + 2 * number + index) for index in range(2))
        ask(sent, "tenant")
        asked = {"of another salt": (sent, "another"), "never": (never, "another"), "of its salt": (sent, "tenant")}
        seconds = {}
        for name in order.sample(list(asked), 3):
            ask(other, "another")  # the same before each
            seconds[name] = ask(*asked[name])[1]
        for name in num_sooner:
            num_sooner[name] += seconds[name] < seconds["never"]
    assert num_sooner["of its salt"] > NUM_ROUNDS / 2 + FAR  # the test would see it
    assert abs(num_sooner["of another salt"] - NUM_ROUNDS / 2) <= FAR
