"""The engine on a tiny model: what it answers is what full forwards say, whatever else runs, is cached or makes way."""

import asyncio
import gc
import itertools
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import molora
from molora import Generation, Grammar, MoLoRA, RouterConfig, Sampling
from molora.adapter import Adapter
from molora.serving.engine import Engine, EngineConfig, EngineError, EngineFullError, NoFreeSlotError
from molora.serving.request import Request
from molora.serving.stream import Stream

BLEND = {"x": 0.5, "y": 0.25}
ROUTES = ["base", "x", "y", "auto", BLEND]
SOFT = RouterConfig(gate="soft", top_k=2, hidden_dim=32, key_dim=16)
SPARSE = RouterConfig(gate="soft", top_k=3, min_gate=0.3, hidden_dim=32, key_dim=16)
LORA = RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4, lora_alpha=32.0)
RANGES = RouterConfig(kind="token_ranges", ranges=((3, 90, "x"), (90, 170, "y")))
ARCHITECTURES = ["llama", "qwen3", "mistral", "granite", "gemma2", "gemma3_text"]


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    """An engine of its own for a loaded model."""
    made: list[Engine] = []

    def make(m: MoLoRA, **config: Any) -> Engine:
        made.append(Engine(m, EngineConfig(**{"kv_cache_bytes": 1 << 22, "block_size": 4, **config})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(ids: Sequence[int], route: Any, *, start: int = 9, num_new: int = 12, **sampling: Any) -> Request:
    options = Sampling(max_new_tokens=num_new, ignore_eos=True, **sampling)
    return Request(prompt=list(ids), route=route, activation=start, sampling=options)


def check(m: MoLoRA, request: Request, out: Generation) -> None:
    """What was generated is what one full forward of it all says, and so are the routes."""
    start = request.activation
    assert isinstance(start, int)
    logits, routes = m.logits([out.token_ids], [start], route=request.route)
    assert logits[0, out.num_prompt_tokens - 1 : -1].argmax(-1).tolist() == out.generated_ids
    assert [[name for name, _ in route] for route in routes[0][:-1]] == [[n for n, _ in r] for r in out.routes[:-1]]
    for route, expected in zip(out.routes[:-1], routes[0][:-1], strict=True):
        assert [gate for _, gate in route] == pytest.approx([gate for _, gate in expected], abs=1e-5)
    assert out.num_recomputed_tokens == 0


def idle(engine: Engine) -> None:
    """Nothing runs, and nothing is kept from being used again."""
    engine.clear_cache()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert engine.m.slots._num_users.total() == engine.m.slots._num_on_version.total() == 0


class TestEqualsFullForward:
    @pytest.mark.parametrize("router", [RouterConfig(hidden_dim=32, key_dim=16), SOFT, SPARSE, RANGES, LORA], ids=str)
    @pytest.mark.parametrize("config", [{}, {"max_step_tokens": 7, "max_sequences": 3}], ids=["whole", "chunked"])
    def test_mixed_neighbours(self, load_model, engine_of, random_ids, router, config):
        m = load_model(router=router)
        engine = engine_of(m, **config)
        requests = [
            ask(random_ids(10 + 7 * index, seed=index), route, start=3 + 5 * index)
            for index, route in enumerate([*ROUTES, *reversed(ROUTES)])
        ]
        for request, out in zip(requests, engine.generate(requests), strict=True):
            check(m, request, out)
        idle(engine)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_architectures(self, load_model, engine_of, random_ids, architecture):
        m = load_model(architecture)
        engine = engine_of(m, max_step_tokens=11, max_sequences=4)
        prompt = random_ids(30)
        for start in (9, 20):  # the second time the base prefix is found
            requests = [ask(prompt, route, start=start) for route in ROUTES]
            for request, out in zip(requests, engine.generate(requests), strict=True):
                check(m, request, out)

    @pytest.mark.parametrize("window", [3, 8])
    def test_a_sliding_window(self, load_model, engine_of, random_ids, window):
        m = load_model("mistral", sliding_window=window)
        engine = engine_of(m, max_step_tokens=13, max_sequences=4)
        for request in (ask(random_ids(30), route) for route in ROUTES):
            check(m, request, engine.generate(request)[0])

    def test_whatever_is_cached(self, m, engine_of, random_ids):
        """Turn after turn on one conversation: each finds what it may and answers as if it found nothing."""
        engine, fresh = engine_of(m), engine_of(m)
        ids, start = random_ids(21), 9
        for turn, route in enumerate([*ROUTES, *ROUTES]):
            request = ask(ids, route, start=start, num_new=6)
            out = engine.generate(request)[0]
            check(m, request, out)
            fresh.clear_cache()
            alone = fresh.generate(request)[0]
            assert (alone.token_ids, alone.num_reused_tokens) == (out.token_ids, 0)
            assert out.num_reused_tokens >= (9 if turn else 0)
            ids = [*out.token_ids, *random_ids(4, seed=turn)]
            start = 9 if turn % 2 else len(ids) - 3

    @pytest.mark.parametrize("router", [RouterConfig(hidden_dim=32, key_dim=16), LORA], ids=["keys", "lora"])
    def test_preempted_sequences_go_on_where_they_were(self, load_model, engine_of, random_ids, router):
        m = load_model(router=router)
        block_bytes = m.engine._runner.num_bytes_per_token * 4
        engine = engine_of(m, kv_cache_bytes=block_bytes * 25)  # 24 blocks of 4 tokens, and nobody's
        requests = [ask(random_ids(14, seed=s), r, num_new=20) for s, r in enumerate(ROUTES)]
        outs = engine.generate(requests)
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_replayed_tokens > 0
        assert sum(out.num_replayed_tokens for out in outs) == engine.stats().num_replayed_tokens
        for request, out in zip(requests, outs, strict=True):
            check(m, request, out)
            assert out.num_computed_tokens == 14 + 20 - 1 - out.num_reused_tokens + out.num_replayed_tokens
        idle(engine)

    def test_a_token_is_routed_once(self, m, engine_of, random_ids, monkeypatch):
        """A router that changes its mind changes nothing for tokens that were routed before they made way."""
        block_bytes = m.engine._runner.num_bytes_per_token * 4
        engine = engine_of(m, kv_cache_bytes=block_bytes * 12)
        requests = [ask(random_ids(14, seed=s), "auto", num_new=18) for s in range(2)]
        routes: dict[int, list[Any]] = {}
        seen = engine._steps._note

        def note(work, answer, out, index):
            seen(work, answer, out, index)
            for position, route in enumerate(out.routes[index], work.first):
                routes.setdefault((id(answer), position), []).append(route)
            m.decoder.router.keys_CD.data.neg_()

        monkeypatch.setattr(engine._steps, "_note", note)
        keys = m.decoder.router.keys_CD.data.clone()
        try:
            engine.generate(requests)
        finally:
            m.decoder.router.keys_CD.data.copy_(keys)
        again = [taken for taken in routes.values() if len(taken) > 1]
        assert len(again) == engine.stats().num_replayed_tokens > 0
        assert all(route == taken[0] for taken in again for route in taken)


class TestSharing:
    def test_a_b_a(self, m, engine_of, random_ids):
        """Alternating adapters on one prompt: none reads what the other computed."""
        engine, prompt = engine_of(m), random_ids(30)
        first = {route: engine.generate(ask(prompt, route))[0] for route in ("x", "y", "auto")}
        assert len({tuple(out.generated_ids) for out in first.values()}) == 3
        for route in ("x", "y", "auto", "y", "x"):
            out = engine.generate(ask(prompt, route))[0]
            assert (out.generated_ids, out.num_reused_tokens) == (first[route].generated_ids, 29)

    def test_a_conversation_invokes_adapters_in_parallel(self, m, engine_of, random_ids):
        engine, history = engine_of(m), random_ids(60)
        wanted = [ask([*history, 5 + index], route, start=60) for index, route in enumerate(["x", "y", "auto", BLEND])]
        outs = engine.generate(wanted)
        assert engine.stats().num_computed_tokens == 60 + len(wanted) * 12, "the history was read once"
        for request, out in zip(wanted, outs, strict=True):
            check(m, request, out)
        assert [out.num_reused_tokens for out in outs[1:]] == [60] * 3

    def test_salts_share_nothing(self, m, engine_of, random_ids):
        engine, prompt = engine_of(m), random_ids(30)
        for salt, expected in (("a", 0), ("b", 0), ("", 0), ("a", 29)):
            request = Request(prompt=prompt, route="base", salt=salt, sampling=Sampling(max_new_tokens=2))
            assert engine.generate(request)[0].num_reused_tokens == expected

    def test_n_answers_read_the_prompt_once(self, m, engine_of, random_ids):
        engine = engine_of(m)
        outs = engine.generate(ask(random_ids(30), "auto", num_new=5, n=4, temperature=3.0, seed=1))
        assert [out.choice for out in outs] == [0, 1, 2, 3]
        assert len({tuple(out.generated_ids) for out in outs}) == 4
        assert [out.num_reused_tokens for out in outs] == [0, 29, 29, 29]
        assert engine.stats().num_prompt_tokens == 30
        for choice in range(4):  # a draw depends on the seed, the choice and the position, on nothing that runs beside
            again = engine.generate(ask(random_ids(30), "auto", num_new=5, n=choice + 1, temperature=3.0, seed=1))
            assert again[choice].generated_ids == outs[choice].generated_ids


class TestAdaptersAtRunTime:
    @pytest.fixture
    def served(self, make_bank, key_router, engine_of, tmp_path) -> Engine:
        m = molora.load(make_bank(tmp_path, router=key_router()), device="cpu", dtype="float32", num_extra_slots=2)
        return engine_of(m)

    @pytest.fixture
    def folder(self, make_adapter, tmp_path) -> Callable[..., Any]:
        def write(seed: int, **options: Any) -> Any:
            path = tmp_path / f"new-{seed}"
            make_adapter(seed=seed, **options).write(path)
            return path

        return write

    def reference(self, engine: Engine, request: Request, path: Any) -> list[int]:
        """The answer of an adapter that is in the bank from the start, at a slot of its own."""
        m = engine.m
        adapter = Adapter.read(path)
        slot = next(iter(m.slots._idle))
        m.decoder.set_adapter(slot, adapter)
        from molora.routing import RouteRequest

        ids = list(request.prompt)
        for _ in range(request.sampling.max_new_tokens):
            start = torch.tensor([[request.activation]])
            asked = RouteRequest(start, None, torch.tensor([[[slot]]], dtype=torch.int32), torch.ones(1, 1, 1))
            with torch.inference_mode(), m.decoder.requested(asked):
                ids.append(int(m.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        m.decoder.set_adapter(slot, None)
        return ids[len(request.prompt) :]

    def test_load_use_and_unload(self, served, folder, random_ids):
        path = folder(3)
        request = ask(random_ids(20), "z")
        expected = self.reference(served, request, path)
        with pytest.raises(ValueError, match="has no adapter 'z'"):
            served.submit(request)
        info = served.load_adapter("z", path)
        assert (info.name, info.activation, info.routable) == ("z", 0, False)
        assert [each.name for each in served.adapters()] == ["x", "y", "z"]
        assert served.generate(request)[0].generated_ids == expected
        served.unload_adapter("z")
        with pytest.raises(ValueError, match="has no adapter 'z'"):
            served.submit(request)
        idle(served)

    def test_an_adapter_that_acts_in_every_layer(self, served, folder, random_ids):
        path = folder(4, first_layer=0)
        request = ask(random_ids(20), "all")
        expected = self.reference(served, request, path)
        served.load_adapter("all", path)
        mixed = served.generate([request, ask(random_ids(17), "auto"), ask(random_ids(16), "base")])
        assert mixed[0].generated_ids == expected
        check(served.m, ask(random_ids(17), "auto"), mixed[1])

    def test_an_adapter_of_the_same_name_and_path_never_sees_old_blocks(self, served, folder, make_adapter, random_ids):
        path = folder(5)
        served.load_adapter("z", path)
        request = ask(random_ids(20), "z")
        old = served.generate(request)[0]
        make_adapter(seed=6).write(path)
        expected = self.reference(served, request, path)
        with pytest.raises(ValueError, match="there is an adapter 'z' already"):
            served.load_adapter("z", path)
        served.load_adapter("z", path, replace=True)
        new = served.generate(request)[0]
        assert new.generated_ids == expected != old.generated_ids
        assert new.num_reused_tokens == 9, "the base tokens before activation, and no more"

    def test_running_requests_keep_the_adapter_they_began_with(self, served, folder, random_ids):
        """Also the router's: its column goes to the new adapter for requests that begin now."""
        requests = {route: ask(random_ids(20), route, num_new=40) for route in ("x", "auto")}
        alone = {route: served.generate(request)[0] for route, request in requests.items()}
        assert any(name == "x" for route in alone["auto"].generated_routes for name, _ in route)
        served.clear_cache()
        streams = {route: served.submit(request) for route, request in requests.items()}
        for stream in streams.values():
            next(stream)
        served.load_adapter("x", folder(7), replace=True)
        later = {route: served.submit(request) for route, request in requests.items()}
        for route, stream in streams.items():
            for _ in stream:
                pass
            assert stream.result.token_ids == alone[route].token_ids
            assert stream.result.routes == alone[route].routes
        for route, stream in later.items():
            for _ in stream:
                pass
            assert stream.result.generated_ids != alone[route].generated_ids
            check(served.m, requests[route], stream.result)
        idle(served)

    def test_an_adapter_that_is_replaced_while_a_request_is_checked_acts_from_its_own_start(
        self, served, folder, random_ids, monkeypatch
    ):
        request = Request(prompt=random_ids(20), route="z", sampling=Sampling(max_new_tokens=4, ignore_eos=True))
        served.load_adapter("z", folder(5), activation=3)
        acquire = served.m.slots.acquire

        def too_late(route):
            monkeypatch.undo()
            served.load_adapter("z", folder(6), activation=7, replace=True)
            return acquire(route)

        monkeypatch.setattr(served.m.slots, "acquire", too_late)
        assert served.generate(request)[0].activation_start == 7
        idle(served)

    def test_slots_run_out_and_come_back(self, served, folder, random_ids):
        served.load_adapter("one", folder(11))
        served.load_adapter("two", folder(12))
        served.load_adapter("three", folder(13))  # takes the slot that was used least recently
        assert [served.m.slots.resident(name) for name in ("x", "y", "one", "two", "three")] == [
            *[True, True, False, True, True]
        ]
        assert served.m.slots.residents() == ["x", "y", "two", "three"]
        running = [served.submit(ask(random_ids(20), name, num_new=900)) for name in ("two", "three")]
        with pytest.raises(NoFreeSlotError, match="all 4 adapter slots are in use"):
            served.submit(ask(random_ids(9), "one"))
        with pytest.raises(NoFreeSlotError):
            served.load_adapter("x", folder(14), replace=True)
        for stream in running:
            stream.close()
        idle(served)
        assert served.generate(ask(random_ids(9), "one"))[0].num_generated_tokens == 12
        assert not served.m.slots.resident("two") or not served.m.slots.resident("three")

    def test_blends_of_adapters_that_are_not_in_slots(self, served, folder, random_ids):
        """Whatever was dropped is read again, and no part of a blend takes another one's slot."""
        for seed, name in enumerate("pqr", 40):
            served.load_adapter(name, folder(seed))
        for names in (*itertools.permutations("pqr", 2), ("p", "x"), ("x", "q"), ("r", "y")):
            blend = dict(zip(names, (0.5, 0.75), strict=True))
            request = ask(random_ids(14), blend, num_new=6)
            check(served.m, request, served.generate(request)[0])
        with pytest.raises(NoFreeSlotError):
            served.submit(ask(random_ids(9), dict.fromkeys("pqr", 0.5)))
        idle(served)

    def test_routes_are_in_the_names_of_the_request(self, served, folder, random_ids):
        path, prompt = folder(50), random_ids(20)
        for name in ("first", "second"):
            served.load_adapter(name, path)
            out = served.generate(ask(prompt, name))[0]
            assert out.routes == [*[()] * 9, *[((name, 1.0),)] * 22, ()]
            served.unload_adapter(name)
        assert out.num_reused_tokens == 19, "the contents are the same, whatever they are called"

    def test_loading_keeps_nobody_waiting(self, served, folder, random_ids, monkeypatch):
        path = folder(60)
        entered, go_on = threading.Event(), threading.Event()
        put = served.m.decoder.set_adapter

        def slowly(slot: int, adapter: Any) -> None:
            entered.set()
            assert go_on.wait(30)
            put(slot, adapter)

        monkeypatch.setattr(served.m.decoder, "set_adapter", slowly)
        streams = [served.submit(ask(random_ids(9), "x", num_new=n)) for n in (3, 30)]
        loading = threading.Thread(target=served.load_adapter, args=("slow", path))
        loading.start()
        assert entered.wait(30)
        for stream, num_new in zip(streams, (3, 30), strict=True):  # the first one's end must not stop the second
            assert len(list(stream)) == num_new
        go_on.set()
        loading.join(30)
        idle(served)

    def test_reading_what_was_dropped_keeps_only_those_waiting_who_need_it(
        self, served, folder, random_ids, monkeypatch
    ):
        for seed, name in enumerate("pqr", 70):
            served.load_adapter(name, folder(seed))
        assert not served.m.slots.resident("p")
        entered, go_on, reads, read = threading.Event(), threading.Event(), [], Adapter.read

        def slowly(path: Any) -> Adapter:
            reads.append(path)
            entered.set()
            assert go_on.wait(30)
            return read(path)

        monkeypatch.setattr(Adapter, "read", slowly)
        outs: list[Generation] = []
        request = ask(random_ids(9), "p", num_new=3)
        waiting = [threading.Thread(target=lambda: outs.extend(served.generate(request))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        assert entered.wait(30)
        for name in ("x", "r", "auto"):  # these are in slots
            assert served.generate(ask(random_ids(9), name, num_new=3))[0].num_generated_tokens == 3
        assert not outs
        go_on.set()
        for thread in waiting:
            thread.join(30)
        assert len(outs) == 2
        assert len(reads) == 1, "the second one finds what the first has read"
        check(served.m, request, outs[0])
        idle(served)

    def test_many_versions_come_and_go(self, served, folder, random_ids):
        paths = [folder(20), folder(21)]
        for turn in range(40):
            served.load_adapter("x", paths[turn % 2], replace=True)
            check(served.m, ask(random_ids(12), "auto"), served.generate(ask(random_ids(12), "auto"))[0])
        assert len(served.m.slots._versions) == 1

    def test_what_cannot_be_loaded_changes_nothing(self, served, folder, make_adapter, tmp_path):
        before = served.m.slots.current
        (tmp_path / "empty").mkdir()
        folder(30, rank=32)
        for path, error in ((tmp_path / "empty", FileNotFoundError), (tmp_path / "new-30", ValueError)):
            with pytest.raises(error):
                served.load_adapter("z", path)
        for name in ("../z", "/z", "", "base", "auto", "a b"):
            with pytest.raises(ValueError, match="is no legal name"):
                served.load_adapter(name, folder(31))
        with pytest.raises(ValueError, match="has a column of the router"):
            served.unload_adapter("x")
        with pytest.raises(ValueError, match="cannot replace a routable one"):
            served.load_adapter("x", folder(32, first_layer=0), replace=True)
        assert served.m.slots.current is before


class TestFaults:
    def test_a_step_that_fails_ends_its_requests_alone(self, m, engine_of, random_ids):
        engine = engine_of(m, max_sequences=2)
        request = ask(random_ids(12), "auto")
        expected = engine.generate(request)[0].token_ids
        layer = m.model.get_decoder().layers[3]
        fails = iter([False, False, True])

        def fail(*_: Any) -> None:
            if next(fails, False):
                raise torch.OutOfMemoryError("CUDA out of memory")

        handle = layer.register_forward_pre_hook(fail)
        try:
            streams = [engine.submit(ask(random_ids(9, seed=s), "x")) for s in range(3)]  # the third one waits
            for stream in streams[:2]:
                with pytest.raises(EngineError, match="the step failed: CUDA out of memory"):
                    list(stream)
            assert len(list(streams[2])) == 12
        finally:
            handle.remove()
        assert engine.stats().num_failed_steps == 1
        assert engine.generate(request)[0].token_ids == expected
        idle(engine)

    def test_a_fault_of_its_own_leaves_nobody_waiting(self, m, engine_of, random_ids, monkeypatch):
        engine = engine_of(m)
        request = ask(random_ids(12), "auto")
        expected = engine.generate(request)[0].token_ids
        with monkeypatch.context() as patch:
            patch.setattr(engine._steps.scheduler, "plan", lambda: 1 / 0)
            with pytest.raises(EngineError, match="the engine failed: division by zero"):
                engine.generate(request)
        assert engine.generate(request)[0].token_ids == expected
        idle(engine)

    def test_a_fault_of_one_answer_is_its_own(self, m, engine_of, random_ids, monkeypatch):
        engine = engine_of(m)
        good = engine.submit(ask(random_ids(9), "x", num_new=40))
        decode = engine._decode
        engine._decode = lambda ids: 1 / 0
        with pytest.raises(EngineError, match="could not go on: division by zero"):
            engine.generate(ask(random_ids(9), "y"))
        engine._decode = decode
        assert len(list(good)) == 40
        with pytest.raises(ValueError, match="salt is no text"):
            engine.submit(Request(prompt=random_ids(5), route="x", activation=0, salt="\ud800"))
        idle(engine)

    @pytest.mark.parametrize("num_tokens", [12, 30])
    def test_numbers_that_overflow_reach_no_base_token(self, m, engine_of, random_ids, num_tokens):
        """Base and active tokens are read in one chunk, and the adapter's are not finite."""
        prompt = random_ids(num_tokens)
        expected = engine_of(m).generate(ask(prompt, "base"))[0]
        engine = engine_of(m)
        kept = [each.scaling_E.clone() for each in m.decoder.linears.values()]
        try:
            for each in m.decoder.linears.values():
                each.scaling_E[0] = torch.inf
            with pytest.raises(EngineError, match="numbers overflowed"):
                engine.generate(ask(prompt, "x"))
        finally:
            for each, scaling_E in zip(m.decoder.linears.values(), kept, strict=True):
                each.scaling_E.copy_(scaling_E)
        out = engine.generate(ask(prompt, "base"))[0]
        assert out.num_reused_tokens == 9
        assert out.token_ids == expected.token_ids
        check(m, ask(prompt, "x"), engine_of(m).generate(ask(prompt, "x"))[0])

    def test_a_sequence_that_needs_every_block(self, m, engine_of, random_ids):
        """Where a block that would be copied stands in its own way, it is computed."""
        engine = engine_of(m, kv_cache_bytes=m.engine._runner.num_bytes_per_token * 4 * 5)
        first = engine.generate(ask(random_ids(10), "x", num_new=1))[0]
        request = ask([*first.token_ids[:10], 50, 51, 52], "x", num_new=3)
        check(m, request, engine.generate(request)[0])
        idle(engine)

    def test_more_requests_than_may_wait(self, m, engine_of, random_ids):
        engine = engine_of(m, max_waiting=2, max_sequences=2)
        requests = [ask(random_ids(9, seed=s), ROUTES[s % 5], num_new=3) for s in range(12)]
        outs = engine.generate(requests)
        for request, out in zip(requests, outs, strict=True):
            check(m, request, out)
        again = asyncio.run(engine.agenerate(requests))
        assert [out.token_ids for out in again] == [out.token_ids for out in outs]
        idle(engine)

    def test_models_whose_tokens_see_more_than_their_sequence_are_refused(self, load_model, engine_of):
        config = load_model().model.config
        for name, value, message in (
            ("attention_chunk_size", 8, "its attention is chunked"),
            ("use_bidirectional_attention", True, "looks ahead"),
            ("rope_parameters", {"rope_type": "longrope"}, "longrope"),
        ):
            before = getattr(config, name, None)
            setattr(config, name, value)
            try:
                with pytest.raises(ValueError, match=f"cannot be served .*{message}"):
                    engine_of(load_model())
            finally:
                setattr(config, name, before)

    def test_who_leaves_stops_within_a_step(self, m, engine_of, random_ids):
        engine = engine_of(m)
        streams = [engine.submit(ask(random_ids(9, seed=s), r, num_new=900, n=2)) for s, r in enumerate(ROUTES)]
        for stream in streams:
            next(stream)
            stream.close()
            assert list(stream) == []
        idle(engine)
        assert engine.stats().num_generated_tokens < 900

    def test_too_many_are_refused(self, m, engine_of, random_ids):
        engine = engine_of(m, max_waiting=2, max_sequences=1)
        with m.lock:  # the engine cannot step
            streams = [engine.submit(ask(random_ids(9), "x")) for _ in range(2)]
            errors: list[EngineFullError] = []
            for _ in range(4):
                try:
                    streams.append(engine.submit(ask(random_ids(9), "x")))
                except EngineFullError as error:
                    errors.append(error)
            assert 3 <= len(errors) <= 4, "one may run"
        assert all(error.retry_after_s > 0 for error in errors)
        for stream in streams:
            assert len(list(stream)) == 12
        idle(engine)

    def test_a_closed_engine_refuses_and_lets_those_that_run_end(self, m, engine_of, random_ids):
        engine = engine_of(m)
        short, long = engine.submit(ask(random_ids(9), "x")), engine.submit(ask(random_ids(9), "y", num_new=900))
        next(short)
        engine.close(drain_s=0.5)
        with pytest.raises(EngineError, match="was closed"):
            engine.submit(ask(random_ids(9), "x"))
        assert len(list(short)) == 11
        with pytest.raises(EngineError, match="was closed"):
            list(long)
        assert not engine.is_ready

    def test_nothing_holds_on_to_a_closed_engine(self, m, random_ids):
        engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 22, block_size=4))
        engine.generate(ask(random_ids(9), "x"))
        engine.close()
        left = weakref.ref(engine)
        del engine
        gc.collect()
        assert left() is None

    def test_the_garbage_collector_passes_over_what_a_warm_engine_needs(self, m):
        engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 22, block_size=4))
        gc.unfreeze()  # what another test has left
        engine.warm_up()
        assert gc.get_freeze_count() > 1000
        engine.close()
        assert not gc.get_freeze_count()

    def test_it_may_be_closed_by_several_at_once_while_others_ask(self, m, random_ids):
        errors: list[BaseException] = []

        def guarded(action: Callable[[], Any]) -> threading.Thread:
            def run() -> None:
                try:
                    action()
                except EngineError:
                    pass  # it is closed
                except BaseException as error:
                    errors.append(error)

            return threading.Thread(target=run)

        for _ in range(20):
            engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 22, block_size=4))
            asks = [ask(random_ids(9), "x", num_new=2) for _ in range(3)]
            threads = [guarded(engine.close) for _ in range(3)]
            threads += [guarded(lambda one=one, engine=engine: engine.submit(one).close()) for one in asks]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert errors == []

    def test_inside_routing_it_says_so(self, m, random_ids):
        with m.routing([0], "x"), pytest.raises(RuntimeError, match=r"use m\.model\.generate"):
            m.generate(random_ids(5), route="x", activation=0)

    def test_what_can_never_fit_is_refused(self, m, engine_of, random_ids):
        engine = engine_of(m, kv_cache_bytes=m.engine._runner.num_bytes_per_token * 4 * 11)
        assert engine.capacity == 40
        with pytest.raises(ValueError, match="at most 40 tokens"):
            engine.submit(ask(random_ids(30), "x"))
        out = engine.generate(Request(prompt=random_ids(38), route="x", activation=0))[0]
        assert (out.num_generated_tokens, out.finish_reason) == (2, "length")
        with pytest.raises(ValueError, match="hold no block"):
            engine_of(m, kv_cache_bytes=100)

    def test_the_model_may_be_called_beside_it(self, m, engine_of, random_ids):
        engine, ids = engine_of(m), random_ids(40)
        expected, routes = m.logits([ids], [7])
        stream = engine.submit(ask(random_ids(9), "auto", num_new=200))
        for _ in range(20):
            logits, got = m.logits([ids], [7])
            assert torch.equal(logits, expected)
            assert got == routes
        assert len(list(stream)) == 200


class TestStreams:
    def test_an_event_loop(self, m, engine_of, random_ids):
        engine = engine_of(m)
        requests = [ask(random_ids(9 + s, seed=s), route) for s, route in enumerate(ROUTES)]
        expected = engine.generate(requests)

        async def read(request: Request) -> tuple[list[int], Generation]:
            async with await asyncio.to_thread(engine.submit, request) as stream:
                return [token.id async for token in stream], stream.result

        async def run() -> None:
            for (ids, out), wanted in zip(await asyncio.gather(*map(read, requests)), expected, strict=True):
                assert ids == out.generated_ids == wanted.generated_ids
            assert [out.token_ids for out in await engine.agenerate(requests)] == [out.token_ids for out in expected]
            with pytest.raises(ValueError, match="no adapter"):
                await engine.agenerate([requests[0], ask([5], "nobody")])

        asyncio.run(run())
        idle(engine)

    def test_threads(self, m, engine_of, random_ids):
        engine = engine_of(m, max_sequences=3)
        requests = [ask(random_ids(9 + s, seed=s), ROUTES[s % 5], num_new=8) for s in range(12)]
        outs: dict[int, Generation] = {}

        def run(index: int) -> None:
            outs[index] = engine.generate(requests[index])[0]

        threads = [threading.Thread(target=run, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for index, request in enumerate(requests):
            check(m, request, outs[index])

    def test_tokens_say_what_they_are(self, m, engine_of, random_ids):
        stream: Stream = engine_of(m).submit(ask(random_ids(9), "auto", start=3, n=2, temperature=1.0, seed=5))
        tokens = list(stream)
        for choice, result in enumerate(stream.results):
            own = [token for token in tokens if token.choice == choice]
            assert [token.id for token in own] == result.generated_ids
            assert "".join(token.text for token in own) == result.text
            assert [token.route for token in own] == result.generated_routes
            assert [token.finish_reason for token in own] == [*[None] * 11, "length"]
            for token in own:
                best, other = token.candidates
                assert [name for name, _ in token.route] == ([] if best[0] == "base" else [best[0]])
                assert 1 >= best[1] >= other[1] >= 0
        with pytest.raises(RuntimeError, match="no result"):
            _ = engine_of(m).submit(ask(random_ids(9), "x")).results
        assert next(iter(engine_of(m).submit(ask(random_ids(9), "x")))).candidates == ()

    def test_stop_strings(self, m, engine_of, random_ids):
        engine = engine_of(m)
        free = engine.generate(ask(random_ids(12), "x", num_new=40))[0]
        stop = free.text[15:18]
        assert stop in free.text
        stream = engine.submit(ask(random_ids(12), "x", num_new=40, stop=("never seen", stop)))
        tokens = list(stream)
        out = stream.result
        assert out.text == free.text[: free.text.index(stop)] == "".join(token.text for token in tokens)
        assert out.finish_reason == tokens[-1].finish_reason == "stop"
        assert out.generated_ids == free.generated_ids[: out.num_generated_tokens]

    def test_stop_tokens(self, m, engine_of, random_ids):
        engine = engine_of(m)
        free = engine.generate(ask(random_ids(12), "x", num_new=20))[0]
        stop = free.generated_ids[7]
        out = engine.generate(ask(random_ids(12), "x", num_new=20, stop_token_ids=(stop,)))[0]
        assert out.generated_ids == free.generated_ids[: free.generated_ids.index(stop) + 1]
        assert out.finish_reason == "stop"

    def test_grammars(self, m, engine_of, random_ids):
        """A random model writes what it must, beside others that write what they like."""
        engine = engine_of(m)
        properties = {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["yes", "no"]}}
        schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
        json_schema, regex = Grammar("json_schema", json.dumps(schema)), Grammar("regex", "[ab]{3}-[0-9]{2}")
        free = ask(random_ids(12), "auto")
        requests = [
            *(ask(random_ids(9, seed=s), r, num_new=400, grammar=json_schema) for s, r in enumerate(ROUTES)),
            *(ask(random_ids(9, seed=s), "x", grammar=regex, temperature=t, n=2) for s, t in enumerate([0.0, 2.0])),
            free,
        ]
        outs = engine.generate(requests)
        for out in outs[:5]:
            value = json.loads(out.text)
            assert set(value) == {"a", "b"}
            assert 0 <= value["a"] <= 99
            assert value["b"] in ("yes", "no")
            assert out.finish_reason == "stop"
        for out in outs[5:9]:
            assert re.fullmatch("[ab]{3}-[0-9]{2}", out.text)
            assert out.finish_reason == "stop"
        check(m, free, outs[9])
        with pytest.raises(ValueError, match="regular expression"):
            engine.submit(ask([5], "x", grammar=Grammar("regex", "(")))
        too_long = Grammar("regex", "a{30}" + r"\w?" * 500)  # which shows only as it is followed
        with pytest.raises(EngineError, match="the answer could not go on: lexer error"):
            engine.generate(ask([5], "x", num_new=40, grammar=too_long))
        idle(engine)

    @pytest.mark.parametrize("config", [{}, {"max_step_tokens": 7, "max_sequences": 3}], ids=["whole", "chunked"])
    def test_log_probabilities(self, m, engine_of, random_ids, config):
        engine = engine_of(m, **config)
        prompt = random_ids(20)
        engine.generate(ask(prompt, "auto"))
        request = ask(prompt, "auto", logprobs=3, prompt_logprobs=2, n=2, temperature=2.0, seed=0)
        for out in engine.generate(request):
            logits, _ = m.logits([out.token_ids], [9])
            logprobs = logits[0].log_softmax(-1)
            for position, logprob in enumerate(out.logprobs, 19):
                self.check_logprob(logprobs[position], out.token_ids[position + 1], logprob, 3)
            if out.choice:
                assert out.prompt_logprobs is None
            else:
                assert out.num_reused_tokens == 0, "they need the logits of the whole prompt"
                assert out.prompt_logprobs[0] is None
                assert len(out.prompt_logprobs) == 20
                for position, logprob in enumerate(out.prompt_logprobs[1:]):
                    self.check_logprob(logprobs[position], prompt[position + 1], logprob, 2)

    def test_log_probabilities_of_a_prompt_that_made_way(self, m, engine_of, random_ids):
        engine = engine_of(
            m, kv_cache_bytes=m.engine._runner.num_bytes_per_token * 4 * 16, max_step_tokens=9, max_sequences=4
        )
        requests = [ask(random_ids(14, seed=s), "x", num_new=20, prompt_logprobs=0) for s in range(4)]
        outs = engine.generate(requests)
        assert engine.stats().num_replayed_tokens > 0
        for out in outs:
            logits, _ = m.logits([out.token_ids], [9], route="x")
            logprobs = logits[0].log_softmax(-1)
            assert len(out.prompt_logprobs) == 14
            for position, logprob in enumerate(out.prompt_logprobs[1:]):
                self.check_logprob(logprobs[position], out.token_ids[position + 1], logprob, 0)

    def check_logprob(self, logprobs_V, token_id, got, num_top):
        assert got.token_id == token_id
        assert got.logprob == pytest.approx(float(logprobs_V[token_id]), abs=1e-4)
        top = logprobs_V.topk(num_top)
        assert [i for i, _ in got.top] == top.indices.tolist()
        assert [value for _, value in got.top] == pytest.approx(top.values.tolist(), abs=1e-4)
