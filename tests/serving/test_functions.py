"""Functions called behind a conversation: their answers are those of a full forward, and nothing is read twice."""

import math

import pytest
import torch

import molora
from molora import Sampling
from molora.serving.engine import Engine, EngineConfig, Request
from molora.serving.functions import Function, best_of_n, call, call_each, vote

QUESTION = [{"role": "user", "content": "What is 417 plus 385 minus 96?"}]
CHECK = Function("check", "Is this answer right, yes or no?")
GUESS = Function("guess", "Which is it?", ("red", "green", "blue"))
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Answer: 706"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, make_function_bank):
    invocations = {each.adapter: each.invocation for each in (CHECK, GUESS)}
    m = molora.load(
        make_function_bank(tmp_path_factory.mktemp("functions"), invocations), device="cpu", dtype="float32"
    )
    m._engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 24, block_size=512))  # no conversation here fills a block
    return m


@pytest.fixture
def m(loaded):
    loaded.engine.clear_cache()
    return loaded


def read(m, messages):
    """The base reads a conversation, and what it reads to answer."""
    sampling = Sampling(max_new_tokens=1)
    (out,) = m.engine.generate([Request(prompt=messages, route="base", sampling=sampling)])
    return out


@pytest.mark.parametrize("function", [CHECK, GUESS, Function("base", "Is this answer right, yes or no?")])
def test_probabilities_are_those_of_a_full_forward(m, function):
    prompt = m.render(function.behind(ANSWERED))
    logits, _ = m.logits([list(prompt.token_ids)], [prompt.starts["turn"]], route=function.adapter)
    first_ids = [m.tokenizer(label)["input_ids"][0] for label in function.labels]
    expected = logits[0, -1, first_ids].double().softmax(-1)
    verdict = call(m, function, ANSWERED)
    assert torch.allclose(torch.tensor(verdict.probabilities, dtype=torch.float64), expected, atol=1e-6)
    assert math.isclose(sum(verdict.probabilities), 1)
    assert verdict.label == function.labels[int(expected.argmax())]
    assert verdict.score == verdict.probabilities[0]
    assert not all(share in (0, 1) for share in verdict.probabilities)


def test_a_call_computes_its_invocation_and_no_more(m):
    reading = read(m, ANSWERED)
    assert reading.num_reused_tokens == 0
    prompt = m.render(CHECK.behind(ANSWERED))
    verdict = call(m, CHECK, ANSWERED)
    assert verdict.num_prompt_tokens == len(prompt.token_ids)
    assert verdict.num_reused_tokens == prompt.starts["turn"]  # all that stands before the invocation
    num_rare = verdict.num_computed_tokens - (len(prompt.token_ids) - prompt.starts["turn"])
    assert 0 <= num_rare <= 2  # a label that is not among the likeliest tokens is asked for once more
    other = call(m, GUESS, ANSWERED)
    assert other.num_reused_tokens == prompt.starts["turn"]
    assert m.engine.stats().num_recomputed_tokens == 0


def test_many_calls_are_those_of_each_alone(m):
    conversations = [ANSWERED, QUESTION, [*ANSWERED, {"role": "user", "content": "Are you sure?"}]]
    together = call_each(m, CHECK, conversations)
    for messages, verdict in zip(conversations, together, strict=True):
        m.engine.clear_cache()
        alone = call(m, CHECK, messages)
        assert alone.probabilities == pytest.approx(verdict.probabilities, abs=1e-5)
    assert call_each(m, CHECK, []) == []


def test_the_highest_score_of_n_is_taken_and_the_question_is_read_once_by_each(m):
    found = best_of_n(m, QUESTION, check=CHECK, draft="x", n=4, temperature=1.5, seed=3, max_new_tokens=12)
    assert len({draft.text for draft in found.drafts}) > 1
    scores = [call(m, CHECK, [*QUESTION, {"role": "assistant", "content": draft.text}]).score for draft in found.drafts]
    assert [verdict.score for verdict in found.verdicts] == pytest.approx(scores, abs=1e-5)
    assert found.best == scores.index(max(scores))  # all of them differ
    by_length = best_of_n(
        m, QUESTION, check=CHECK, draft="x", n=4, temperature=1.5, seed=3, max_new_tokens=12, answer_of=lambda _: "one"
    )
    assert by_length.drafts[0].text == found.drafts[0].text
    assert by_length.best == 0  # of the only answer, the first draft
    assert found.text == found.drafts[found.best].text
    assert found.score == found.verdicts[found.best].score
    # Of the drafts, the first one reads the question; the others find it, but for its last token, which they draw from.
    asked = len(m.render(QUESTION).token_ids)
    assert found.drafts[0].num_reused_tokens == 0
    assert all(draft.num_reused_tokens >= asked - 1 for draft in found.drafts[1:])
    # Of the checks, the first one reads it as base; the others find all that they have in common with it.
    shared = m.render(QUESTION).starts["response"]
    first, *others = dict.fromkeys(found.verdicts)
    assert first.num_reused_tokens < shared  # what stands before the question, which is base's in the drafts, too
    assert first.num_reused_tokens == m.render(QUESTION).starts["turn"]
    assert all(verdict.num_reused_tokens >= shared for verdict in others)
    assert found.num_reused_tokens == sum(
        each.num_reused_tokens for each in (*found.drafts, *dict.fromkeys(found.verdicts))
    )


@pytest.mark.parametrize(
    ("answers", "weights", "taken"),
    [
        ("abab", (0.4, 0.6, 0.4, 0.1), 0),  # 0.8 of two drafts against 0.7
        ("aba", (0.3, 0.9, 0.3), 1),
        ("ba", (0.5, 0.5), 0),
    ],
)
def test_the_answer_with_most_score_is_taken(answers, weights, taken):
    assert vote(answers, weights) == taken


def test_equal_drafts_are_checked_once(m):
    found = best_of_n(m, QUESTION, check=CHECK, draft="x", n=3, temperature=0.0, max_new_tokens=6)
    assert len({id(verdict) for verdict in found.verdicts}) == 1
    assert found.best == 0


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("yes",), "two different"),
        (("yes", "yes"), "two different"),
        (("yes", ""), "two different"),
        ("yn", "as a tuple"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        Function("check", "Right?", labels)


def test_what_cannot_be_called_is_refused(m):
    with pytest.raises(ValueError, match="begin with the same token"):
        call(m, Function("check", CHECK.invocation, ("yes", "yeah")), ANSWERED)
    with pytest.raises(ValueError, match=r"invocation tokens .* do not occur"):
        call(m, Function("check", "Is that so?"), ANSWERED)
    with pytest.raises(ValueError, match="has no adapter 'judge'"):
        call(m, Function("judge", "Is that so?"), ANSWERED)
    with pytest.raises(ValueError, match="empty invocation"):
        Function("check", "")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (Function("judge", CHECK.invocation), "has no adapter 'judge'"),
        (Function("check", "Is that so?"), "do not occur"),
        (Function("check", CHECK.invocation, ("yes", "yeah")), "begin with the same token"),
    ],
)
def test_nothing_is_drafted_for_a_check_that_cannot_be_called(m, check, words):
    before = m.engine.stats().num_generated_tokens
    with pytest.raises(ValueError, match=words):
        best_of_n(m, QUESTION, check=check, draft="x", n=2, max_new_tokens=4)
    assert m.engine.stats().num_generated_tokens == before
