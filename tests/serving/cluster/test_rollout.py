"""Adapters on several engines by version, without Ray: all of them have it, or none."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import pytest

import molora
from molora.adapter import Adapter
from molora.serving.cluster import follower as follower_module
from molora.serving.cluster import rollout as rollout_module
from molora.serving.cluster.follower import Follower
from molora.serving.cluster.rollout import LEASE_S, Failure, LoadedAdapter, Rollout, RolloutStore
from molora.serving.engine import Engine, EngineConfig
from molora.serving.errors import UnavailableError
from molora.slots import NoFreeSlotError

NOTHING = Failure()
WAIT_S = 60  # for what takes a moment, on a busy machine too


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, make_bank, key_router):
    """Two models of one bank, with room for an adapter more."""
    bank = make_bank(tmp_path_factory.mktemp("bank"), router=key_router())
    return [molora.load(bank, device="cpu", dtype="float32", num_extra_slots=2) for _ in range(2)]


@pytest.fixture
def folder(tmp_path, make_adapter):
    make_adapter(seed=3).write(tmp_path / "z")
    make_adapter(seed=4).write(tmp_path / "other-z")
    return tmp_path


@pytest.fixture
def engines(loaded):
    engines = [Engine(m, EngineConfig(kv_cache_bytes=1 << 22)) for m in loaded]
    yield engines
    for engine in engines:
        engine.close()
        for info in engine.adapters():
            if not info.routable:
                engine.unload_adapter(info.name)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(follower_module, "POLL_S", 0.05)


def full(*args, **options):
    """In the place of `load_adapter`."""
    raise NoFreeSlotError("all 3 adapter slots are in use")


@asynccontextmanager
async def following(engines, store):
    followers = [Follower(engine, store, f"replica {index}") for index, engine in enumerate(engines)]
    try:
        for each in followers:
            await each.start()
        yield followers
    finally:
        for each in followers:
            each.stop()


def digests(engine):
    return {info.name: info.digest for info in engine.adapters()}


def test_one_load_reaches_all(engines, folder):
    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            info = await asyncio.to_thread(first.load_adapter, "z", folder / "z", activation=3)
            assert (info.name, info.activation) == ("z", 3)
            assert digests(engines[0]) == digests(engines[1])
            assert (first.rollout.version, second.rollout.version) == (1, 1)
            with pytest.raises(ValueError, match="already"):
                await asyncio.to_thread(second.load_adapter, "z", folder / "other-z")
            old = digests(engines[0])["z"]
            await asyncio.to_thread(second.load_adapter, "z", folder / "other-z", replace=True)
            assert digests(engines[0]) == digests(engines[1])
            assert digests(engines[0])["z"] != old
            assert {info.activation for engine in engines for info in engine.adapters() if info.name == "z"} == {3}
            await asyncio.to_thread(first.unload_adapter, "z")
            assert [set(digests(engine)) for engine in engines] == [{"x", "y"}] * 2
            assert second.rollout == Rollout(3)

    asyncio.run(run())


def test_who_starts_later_has_it_too(engines, folder):
    async def run():
        store = RolloutStore()
        async with following(engines[:1], store) as (first,):
            await asyncio.to_thread(first.load_adapter, "z", folder / "z")
            async with following(engines[1:], store) as (second,):
                assert second.rollout == first.rollout
                assert digests(engines[1]) == digests(engines[0])

    asyncio.run(run())


def test_who_starts_later_takes_no_other_one_for_it(engines, folder, make_adapter):
    async def run():
        store = RolloutStore()
        async with following(engines[:1], store) as (first,):
            await asyncio.to_thread(first.load_adapter, "z", folder / "z")
            make_adapter(seed=5).write(folder / "z")
            with pytest.raises(ValueError, match=r"'z' in .* is not the one that was loaded"):
                async with following(engines[1:], store):
                    pass
            assert set(digests(engines[1])) == {"x", "y"}

    asyncio.run(run())


def test_what_one_cannot_follow_is_taken_back(engines, folder, monkeypatch):
    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            monkeypatch.setattr(engines[1], "load_adapter", full)
            with pytest.raises(UnavailableError, match="taken back: all 3 adapter slots"):
                await asyncio.to_thread(first.load_adapter, "z", folder / "z")
            assert [set(digests(engine)) for engine in engines] == [{"x", "y"}] * 2
            monkeypatch.undo()
            assert await store.settled(2, WAIT_S) == {}
            assert first.rollout == second.rollout == Rollout(2)

    asyncio.run(run())


def test_only_one_is_rolled_out_at_a_time(engines, folder, monkeypatch):
    """Otherwise the first one could not be taken back: the second one has been built on it."""
    tried, known = threading.Event(), threading.Event()

    def full_after_a_while(*args, **options):
        tried.set()
        known.wait(WAIT_S)
        full()

    async def run():
        async with following(engines, RolloutStore()) as (first, second):
            monkeypatch.setattr(engines[1], "load_adapter", full_after_a_while)
            failing = asyncio.create_task(asyncio.to_thread(first.load_adapter, "z", folder / "z"))
            await asyncio.to_thread(tried.wait, WAIT_S)
            await first.catch_up()
            assert "z" in digests(engines[0])
            with pytest.raises(UnavailableError, match="another adapter is being rolled out"):
                await asyncio.to_thread(first.load_adapter, "w", folder / "other-z")
            known.set()
            with pytest.raises(UnavailableError, match="taken back"):
                await failing
            assert [set(digests(engine)) for engine in engines] == [{"x", "y"}] * 2
            assert first.rollout == second.rollout == Rollout(2)
            monkeypatch.undo()
            await asyncio.to_thread(first.load_adapter, "w", folder / "other-z")
            assert digests(engines[0]) == digests(engines[1])

    asyncio.run(run())


def test_whoever_asked_for_it_may_be_gone(engines, folder, monkeypatch):
    """What nobody else could follow is still taken back."""

    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            monkeypatch.setattr(engines[1], "load_adapter", full)
            asked = Rollout().load("z", LoadedAdapter(str(folder / "z"), Adapter.read(folder / "z").digest))
            assert await store.roll_out(asked, WAIT_S) == {"replica 1": "all 3 adapter slots are in use"}
            assert [set(digests(engine)) for engine in engines] == [{"x", "y"}] * 2
            assert first.rollout == second.rollout == Rollout(2)

    asyncio.run(run())


def test_who_takes_long_to_load_is_waited_for(engines, folder, monkeypatch):
    monkeypatch.setattr(rollout_module, "LEASE_S", 2)
    load = engines[1].load_adapter

    def slowly(*args, **options):
        time.sleep(3)
        return load(*args, **options)

    async def run():
        async with following(engines, RolloutStore()) as (first, _):
            monkeypatch.setattr(engines[1], "load_adapter", slowly)
            await asyncio.to_thread(first.load_adapter, "z", folder / "z")
            assert digests(engines[0]) == digests(engines[1])

    asyncio.run(run())


def test_what_has_changed_while_files_were_read_counts(engines, folder, monkeypatch):
    """A load that began before another one of its name has ended replaces nothing, and nothing is unloaded twice."""
    reading, may_go_on, read = threading.Event(), threading.Event(), Adapter.read

    def slowly(path):
        if path == folder / "other-z":
            reading.set()
            may_go_on.wait(WAIT_S)
        return read(path)

    async def run():
        async with following(engines, RolloutStore()) as (first, second):
            monkeypatch.setattr(Adapter, "read", slowly)
            late = asyncio.create_task(asyncio.to_thread(second.load_adapter, "z", folder / "other-z"))
            await asyncio.to_thread(reading.wait, WAIT_S)
            info = await asyncio.to_thread(first.load_adapter, "z", folder / "z")
            may_go_on.set()
            with pytest.raises(ValueError, match="'z' already"):
                await late
            assert [digests(engine)["z"] for engine in engines] == [info.digest] * 2
            await asyncio.to_thread(first.unload_adapter, "z")
            with pytest.raises(ValueError, match="no adapter 'z'"):
                await asyncio.to_thread(first.unload_adapter, "z")
            assert first.rollout == second.rollout == Rollout(2)

    asyncio.run(run())


def test_what_the_engine_refuses_is_refused_with_its_own_words(engines, folder):
    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            with pytest.raises(ValueError, match="has a column of the router"):
                await asyncio.to_thread(first.unload_adapter, "x")
            with pytest.raises(FileNotFoundError):
                await asyncio.to_thread(first.load_adapter, "z", folder / "nowhere")
            assert await store.settled(2, WAIT_S) == {}
            assert [set(digests(engine)) for engine in engines] == [{"x", "y"}] * 2
            assert first.rollout == second.rollout == Rollout(2)

    asyncio.run(run())


def test_two_at_once_are_one_and_an_error(engines, folder):
    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            results = await asyncio.gather(
                asyncio.to_thread(first.load_adapter, "z", folder / "z"),
                asyncio.to_thread(second.load_adapter, "w", folder / "other-z"),
                return_exceptions=True,
            )
            failed = [each for each in results if isinstance(each, Exception)]
            assert all(isinstance(each, UnavailableError) for each in failed)
            assert len(failed) < 2
            await store.settled(first.rollout.version, 5)
            assert digests(engines[0]) == digests(engines[1])
            assert len(digests(engines[0])) == 4 - len(failed)

    asyncio.run(run())


def test_a_replica_that_is_behind_catches_up_when_asked(engines, folder):
    async def run():
        store = RolloutStore()
        async with following(engines, store) as (first, second):
            second.stop()
            await asyncio.sleep(0)
            loading = asyncio.create_task(asyncio.to_thread(first.load_adapter, "z", folder / "z"))
            while first.rollout.version < 1:
                await asyncio.sleep(0.001)
            assert "z" not in digests(engines[1])
            await second.catch_up()
            assert "z" in digests(engines[1])
            await second.start()
            await loading

    asyncio.run(run())


def test_a_store_that_starts_again_learns_from_those_that_follow():
    async def run():
        rollout = Rollout(4, {"z": LoadedAdapter("z", "digest")})
        store = RolloutStore()
        assert await store.follow("one", rollout, NOTHING, 0) == rollout
        assert await store.follow("two", Rollout(), NOTHING, 0) == rollout
        assert await store.roll_out(rollout.again(4), 0) is None
        assert await store.roll_out(rollout.again(6), 0) is None
        asking = asyncio.create_task(store.roll_out(rollout.again(5), 5))
        for name in ("one", "two"):
            assert await store.follow(name, rollout, NOTHING, 5) == rollout.again(5)
            await store.follow(name, rollout.again(5), NOTHING, 0)
        assert await asking == {}

    asyncio.run(run())


def test_a_store_that_starts_again_first_asks_who_knows_more():
    """Else a replica that starts then, or is behind, would answer with older adapters."""

    async def run():
        rollout = Rollout(4, {"z": LoadedAdapter("z", "digest")})
        store = RolloutStore(learn_s=5)
        starting = asyncio.create_task(store.follow("new", Rollout(), NOTHING, 0))
        await asyncio.sleep(0.01)
        assert not starting.done()
        telling = asyncio.create_task(store.follow("old", rollout, NOTHING, 0))
        assert await asyncio.wait_for(starting, 1) == rollout
        telling.cancel()
        assert await RolloutStore(learn_s=0.05).follow("new", Rollout(), NOTHING, 0) == Rollout()

    asyncio.run(run())


def test_nobody_waits_for_a_replica_that_is_gone():
    async def run():
        now = 0.0
        store = RolloutStore(lambda: now)
        await store.follow("gone", Rollout(), NOTHING, 0)
        waiting = asyncio.create_task(store.roll_out(Rollout(1), 30))
        await asyncio.sleep(0)
        await store.follow("here", Rollout(1), NOTHING, 0)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        now = LEASE_S + 0.1
        await store.follow("here", Rollout(1), NOTHING, 0)
        assert await asyncio.wait_for(waiting, 5) == {}

    asyncio.run(run())


def test_who_fails_and_who_is_late_are_told_apart():
    async def run():
        now = 0.0
        store = RolloutStore(lambda: now)
        await store.follow("fails", Rollout(), Failure(1, "no slot"), 0)
        assert await store.settled(1, 30) == {"fails": "no slot"}
        await store.follow("late", Rollout(), NOTHING, 0)
        assert await store.settled(1, 0) == {"fails": "no slot", "late": "no answer"}

    asyncio.run(run())
