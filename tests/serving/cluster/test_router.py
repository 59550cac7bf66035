"""What a router makes of what Ray Serve tells it, without a cluster."""

import asyncio
from types import SimpleNamespace

import pytest

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
