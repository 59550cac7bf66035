"""The request router: Ray Serve asks it, in each ingress, which replica a request is sent to."""

from __future__ import annotations

import asyncio
import random

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from molora.serving.cluster.http_call import HttpCall
from molora.serving.cluster.prefixes import PrefixMap, choose

PREFIX_KEYS = "prefix_keys"  # of a replica's routing statistics: of the prompts that it has answered last
RESIDENTS = "residents"  # the adapters in its slots
STOPPED_S = 1.0  # how often it is asked, where there are no replicas, whether there are to be any


class PrefixRouter(RequestRouter):
    """To the replica that holds most of a prompt, else to the less loaded of two, which have the request's adapters in
    slots if any replicas do.

    What a replica holds is known from the requests that this router has sent to it, and from what the replica says of
    those that other ingresses have sent; what is in its slots, from what it says.
    """

    def initialize_state(self, **kwargs: int) -> None:
        """
        Args:
            kwargs: max_prefix_keys and max_imbalance, as of `RayConfig`.
        """
        self._max_imbalance = kwargs["max_imbalance"]
        self._prefixes: PrefixMap[ReplicaID] = PrefixMap(kwargs["max_prefix_keys"])
        self._residents: dict[ReplicaID, frozenset[str]] = {}
        self._refusing: asyncio.Task[None] | None = None

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The first rank is tried first; where its replicas are full, the second one is."""
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [two]
        pending_request.routing_context.should_backoff = True  # Ray would ask again at once while all are full
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {replica_id: self.replica_queue_len_cache.get(replica_id) or 0 for replica_id in replicas}
        call = _call(pending_request)
        if call is None:
            return [two]
        ready = {each for each, names in self._residents.items() if call.adapters and call.adapters <= names}
        held = self._prefixes.num_held(call.prefix)
        chosen = choose(held, call.prefix.num_bytes, loads, self._max_imbalance, ready)
        first = [replicas[each] for each in random.sample(chosen, min(2, len(chosen)))]
        return [first, two] if first else [two]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        if (call := _call(pending_request)) is not None:
            self._prefixes.record(call.prefix.keys, replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._prefixes.keep(replica.replica_id for replica in replicas)
        for replica in replicas:
            self._prefixes.record(replica.routing_stats.get(PREFIX_KEYS, ()), replica.replica_id)
        self._residents = {each.replica_id: frozenset(each.routing_stats.get(RESIDENTS, ())) for each in replicas}
        if not replicas and (self._refusing is None or self._refusing.done()):
            self._refusing = asyncio.create_task(self._refuse_when_stopped())

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._prefixes.keep(self.curr_replicas)

    async def _refuse_when_stopped(self) -> None:
        """Until there are replicas: requests wait for them, and Ray ends them unanswered where none will come."""
        while not self.curr_replicas:
            if await asyncio.to_thread(_is_stopped, self.app_name):
                for request in self._pending_requests_to_fulfill:
                    if not request.future.done():
                        request.future.set_exception(DeploymentUnavailableError(self._deployment_id))
            await asyncio.sleep(STOPPED_S)


def _call(request: PendingRequest) -> HttpCall | None:
    call = request.args[0] if request.args else None
    return call if isinstance(call, HttpCall) else None


def _is_stopped(app: str) -> bool:
    try:
        found = serve.status().applications.get(app)
    except Exception:  # Ray's controller is being started again, say
        return False
    return found is not None and found.status == "DELETING"
