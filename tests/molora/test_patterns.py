"""Patterns of modules: PEFT's rule, in short time whatever the pattern."""

import re
import time

import pytest

from molora.patterns import first_match, is_pattern

MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.12.mlp.up_proj", "q_proj", "lm_head", "a.b\nc")
PATTERNS = (
    *(
        "q_proj",
        "self_attn.q_proj",
        "proj",
        ".*",
        "",
        r"layers\.1\..*",
        r".*layers\.(1|12)\..*_proj",
        "[^.]+",
        r"\d+.*",
    ),
    *(
        "^model.layers.1.self_attn.q_proj",
        "q_proj$",
        "(?P<a>q|up)_proj",
        "m.*?d",
        "q_pro{1,2}j",
        r"\w*",
        "(?:lm_)?head",
    ),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_what_peft_finds(pattern):
    assert is_pattern(pattern)
    for module in MODULES:
        expected = re.match(rf"(.*\.)?({pattern})$", module) is not None
        assert first_match({pattern: True}, module, False) == expected, module


def test_the_first_that_matches_counts():
    patterns = {"k_proj": 1, ".*_proj": 2, "q_proj": 3}
    assert [first_match(patterns, f"layers.0.{name}", 0) for name in ("k_proj", "q_proj", "x")] == [1, 2, 0]


@pytest.mark.parametrize("pattern", [".?" * 100, "(.|.)" * 40, "(a*)*b", ".*" * 100, "(x+x+)+y", "[a-z]{0,9}" * 20])
def test_no_pattern_takes_long(pattern):
    begun_s = time.process_time()
    if is_pattern(pattern):
        first_match({pattern: 1}, "x" * 1000 + "!", 0)
    assert time.process_time() - begun_s < 0.5


@pytest.mark.parametrize("pattern", ["(", "(?=a)", r"(a)\1", "a{900}" * 30, "\ud800", "a" * 201, 5, None, b"a"])
def test_what_is_no_pattern(pattern):
    assert not is_pattern(pattern)
