"""What a router makes of what Ray Serve tells it, without a cluster."""

import asyncio
from types import SimpleNamespace

import pytest

from molora.serving.cluster.http_call import HttpCall
from molora.serving.cluster.prefixes import prefix_of

pytestmark = pytest.mark.usefixtures("ray_is_imported")


@pytest.fixture
def statuses(monkeypatch):
    """What Ray's controller says of the application, one answer after the other; the last one stays."""
    from ray import serve

    from molora.serving.cluster import router as router_module

    statuses = ["RUNNING"]

    def status():
        said = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if said is None:
            raise ConnectionError("the controller is being started")
        return SimpleNamespace(applications={"molora": SimpleNamespace(status=said)})

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(router_module, "STOPPED_S", 0.01)
    return statuses


def router_of(**options):
    """As Ray makes one in an ingress."""
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    from molora.serving.cluster.router import PrefixRouter

    router = PrefixRouter(DeploymentID("Replica", "molora"), DeploymentHandleSource.REPLICA)
    router.initialize_state(**{"max_imbalance": 8, "max_prefix_keys": 100, **options})
    return router


def request_of(*args, name="a request"):
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    return PendingRequest(args=list(args), kwargs={}, metadata=RequestMetadata(name, name))


@pytest.mark.parametrize("before", [["DELETING"], [None, "RUNNING", "DELETING"]])
def test_requests_that_wait_when_the_application_is_deleted_are_refused(statuses, before):
    from ray.serve.exceptions import DeploymentUnavailableError

    async def run():
        router = router_of()
        waiting = asyncio.create_task(router._choose_replica_for_request(request_of()))
        await asyncio.sleep(0)
        statuses[:] = before
        router.update_replicas([])
        late = request_of(name="whose body came slowly")
        for each in (waiting, router._choose_replica_for_request(late)):
            with pytest.raises(DeploymentUnavailableError):
                await asyncio.wait_for(each, 10)

    asyncio.run(run())


def test_requests_wait_for_the_replicas_that_come_instead_of_those_that_died(statuses):
    async def run():
        router = router_of()
        waiting = asyncio.create_task(router._choose_replica_for_request(request_of()))
        router.update_replicas([])
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(run())


class Replica:
    """As a router sees one that runs nothing."""

    max_ongoing_requests = 64

    def __init__(self, name, **statistics):
        from ray.serve._private.common import DeploymentID, ReplicaID

        self.replica_id = ReplicaID(name, DeploymentID("Replica", "molora"))
        self.routing_stats = statistics

    async def get_queue_len(self, *, deadline_s):
        return 0


def call_of(*adapters, text="a question"):
    prefix = prefix_of({"prompt": text})
    return HttpCall("POST", "/", b"/", b"", (), b"", prefix, adapters=frozenset(adapters))


def test_a_replica_that_has_the_adapters_in_slots_is_tried_before_others():
    async def run():
        router = router_of(max_imbalance=3)
        replicas = {name: Replica(name) for name in "abcd"}

        async def tried(*adapters, text="a question"):
            ranks = await router.choose_replicas(list(replicas.values()), request_of(call_of(*adapters, text=text)))
            return ["".join(sorted(each.replica_id.unique_id for each in rank)) for rank in ranks]

        def report(**residents):
            for name, names in residents.items():
                replicas[name].routing_stats = {"residents": names}
            router.update_replicas(list(replicas.values()))

        report(a=["x"], b=["x", "y"], c=[])
        assert (await tried("x"))[0] == "ab"
        assert (await tried("x", "y"))[0] == (await tried("y"))[0] == "b"
        for names in ((), ("z",), ("x", "z")):
            (two,) = await tried(*names)
            assert len(two) == 2
        router.on_request_routed(request_of(call_of()), replicas["c"].replica_id, None)
        assert (await tried("x"))[0] == "c"  # which holds the prompt
        assert (await tried("x", text="another"))[0] == "ab"
        router.replica_queue_len_cache.update(replicas["b"].replica_id, 4)
        assert (await tried("x", text="another"))[0] == "a"
        assert len(await tried("y", text="another")) == 1  # too much to do
        report(a=["y"], b=[])
        assert (await tried("y", text="another"))[0] == "a"
        assert len(await tried("x", text="another")) == 1

    asyncio.run(run())
