"""The decode loop: streams, text, sampling, and what stays in the cache."""

import pytest
import torch

from molora.serving.engine import EngineError
from molora.serving.text import TextStream, decode_of
from molora.tiny import byte_tokenizer

TEXT = "Grüße, 你好! 🎉🎊 naïve — done. "


@pytest.fixture
def spoken(m, monkeypatch):
    """Makes the model say token ids of the test's choice; what it computes and keeps stays its own."""

    def say(ids: list[int]) -> None:
        rest = iter(ids)
        monkeypatch.setattr("molora.serving.runner.draw", lambda *_: ([next(rest)], [None]))

    return say


class TestText:
    @pytest.mark.parametrize("repeat", [1, 8])
    def test_pieces_of_multi_byte_text_join_to_the_whole(self, m, spoken, repeat):
        ids = m.tokenizer(TEXT * repeat).input_ids
        spoken(ids)
        stream = m.stream("Say", route="base", max_new_tokens=len(ids))
        tokens = list(stream)
        assert [token.id for token in tokens] == ids
        assert "".join(token.text for token in tokens) == stream.result.text == TEXT * repeat
        assert all("\ufffd" not in token.text for token in tokens)
        assert tokens[2].text == "", "the first byte of ü says nothing yet"
        assert tokens[3].text == "ü"

    def test_text_that_ends_inside_a_character(self, m, spoken):
        ids = m.tokenizer("ab🎉").input_ids[:-1]
        spoken(ids)
        out = m.generate("Say", route="base", max_new_tokens=len(ids))
        assert out.text == m.tokenizer.decode(ids) == "ab\ufffd"
        assert out.finish_reason == "length"

    def test_an_end_token_ends_the_answer_and_is_no_text(self, m, spoken):
        spoken([*m.tokenizer("ok").input_ids, 2, 70])
        stream = m.stream("Say", route="x", activation=0, max_new_tokens=9)
        tokens = list(stream)
        assert [token.text for token in tokens] == ["o", "k", ""]
        out = stream.result
        assert (out.text, out.finish_reason, out.num_generated_tokens) == ("ok", "stop", 3)
        assert out.token_ids[-1] == 2
        assert out.num_computed_tokens == 3 + 3 - 1
        assert out.routes == [*[(("x", 1.0),)] * 5, ()]

    def test_bytes_that_are_no_text(self):
        """Whatever comes, the pieces are the decoded whole."""
        tokenizer = byte_tokenizer()
        for seed in range(20):
            ids = torch.randint(0, 259, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
            text = TextStream(decode_of(tokenizer))
            pieces = [text.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


class TestStream:
    def test_tokens_carry_the_route_that_produced_them(self, m, random_ids):
        stream = m.stream(random_ids(30), activation=8, max_new_tokens=12)
        tokens = list(stream)
        out = stream.result
        assert [token.id for token in tokens] == out.generated_ids
        assert [token.route for token in tokens] == out.generated_routes == out.routes[29:-1]
        assert len({str(token.route) for token in tokens}) > 1

    def test_no_result_before_the_end(self, m, random_ids):
        stream = m.stream(random_ids(9), route="base", max_new_tokens=2)
        next(stream)
        with pytest.raises(RuntimeError, match="the stream has no result before its last token"):
            _ = stream.result
        next(stream)
        with pytest.raises(StopIteration):
            next(stream)
        assert stream.result.num_generated_tokens == 2

    @pytest.mark.parametrize("num_tokens", [1, 3])
    def test_a_stream_that_is_closed_leaves_what_it_computed(self, m, random_ids, num_tokens):
        ids = random_ids(20)
        whole = m.generate(ids, activation=5, max_new_tokens=8)
        m.engine.clear_cache()
        with m.stream(ids, activation=5, max_new_tokens=8) as stream:
            for _ in range(num_tokens):
                next(stream)
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="no result"):
            _ = stream.result
        with m.lock:  # the step that ran has ended
            assert m.decoder.routes.request is None
        continued = m.generate(whole.token_ids, activation=5, max_new_tokens=4)
        # The engine does not wait for those who read: it may have been a few tokens further.
        assert 20 + num_tokens - 1 <= continued.num_reused_tokens <= 27
        m.engine.clear_cache()
        assert continued.token_ids == m.generate(whole.token_ids, activation=5, max_new_tokens=4).token_ids

    def test_a_stream_that_is_closed_is_over_within_a_step(self, m, random_ids):
        stream = m.stream(random_ids(20), activation=3, max_new_tokens=900)
        next(stream)
        assert m.engine.stats().num_running == 1
        stream.close()
        assert list(stream) == []
        m.engine.clear_cache()  # waits for the step, and would refuse while the sequence runs
        assert m.engine.stats().num_running == 0
        assert m.slots._num_users.total() == m.slots._num_on_version.total() == 0

    def test_a_forward_that_fails_leaves_the_cache_usable(self, m, random_ids, monkeypatch):
        ids = random_ids(20)
        expected = m.generate(ids, activation=5, max_new_tokens=6).token_ids
        m.engine.clear_cache()
        layer = m.model.get_decoder().layers[2]
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 3:  # of prefill and two tokens: two layers have their keys already, two have not
                raise MemoryError("no room")

        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(EngineError, match="the step failed: no room") as raised:
            m.generate(ids, activation=5, max_new_tokens=6)
        assert isinstance(raised.value.__cause__, MemoryError)
        handle.remove()
        assert m.engine.stats().num_running == 0
        out = m.generate(expected, activation=5, max_new_tokens=1)
        assert out.num_reused_tokens == 21
        m.engine.clear_cache()
        assert m.generate(expected, activation=5, max_new_tokens=1).token_ids == out.token_ids
        assert m.generate(ids, activation=5, max_new_tokens=6).token_ids == expected


class TestSampling:
    def test_a_seed_makes_a_draw_repeatable(self, m, random_ids):
        ids = random_ids(10)

        def draw(seed: int | None, temperature: float = 5.0) -> list[int]:
            options = {"activation": 3, "max_new_tokens": 12, "temperature": temperature, "seed": seed}
            return m.generate(ids, **options).generated_ids

        state = torch.get_rng_state()
        assert draw(1) == draw(1)
        assert draw(1) != draw(2)
        assert draw(None) != draw(None)
        assert draw(1, temperature=0.0) == draw(2, temperature=0.0)
        assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
