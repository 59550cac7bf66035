"""The gateway that this project has, without what it knows of slots: the Ray router's own code (molora/serving/cluster)
makes the choice.
"""

from collections import deque

import numpy as np

from molora.serving.cluster.config import RayConfig
from molora.serving.cluster.prefixes import PrefixMap, choose, prefix_of
from scaling.parts import Traffic

BYTES_PER_TOKEN = 4


class PrefixGateway:
    """One ingress, which knows all loads; requests are answered in answer_s wherever they go."""

    def __init__(
        self, traffic: Traffic, num_gpus: int, answer_s: float, draw: np.random.Generator, max_keys: int
    ) -> None:
        self._traffic = traffic
        self._answer_s = answer_s
        self._draw = draw
        self._held: PrefixMap[int] = PrefixMap(max_keys)
        self._loads = dict.fromkeys(range(num_gpus), 0)
        self._running: deque[tuple[float, int]] = deque()

    def gpu_of(self, time_s: float, conversation: int, turn: int) -> int:
        while self._running and self._running[0][0] <= time_s:
            self._loads[self._running.popleft()[1]] -= 1
        prefix = prefix_of({"messages": self._messages(conversation, turn)})
        held = self._held.num_held(prefix)
        chosen = choose(held, prefix.num_bytes, self._loads, RayConfig().max_imbalance)
        if not chosen:
            chosen = self._draw.choice(len(self._loads), size=min(2, len(self._loads)), replace=False).tolist()
        gpu = min(chosen, key=self._loads.__getitem__)
        self._held.record(prefix.keys, gpu)
        self._loads[gpu] += 1
        self._running.append((time_s + self._answer_s, gpu))
        return gpu

    def _messages(self, conversation: int, turn: int) -> list[dict[str, str]]:
        """Up to the question of a turn: texts of a conversation's own, behind the system message of all."""

        def text(role: str, number: int, num_tokens: int) -> dict[str, str]:
            return {"role": role, "content": f"{conversation} {number} ".ljust(BYTES_PER_TOKEN * num_tokens)}

        traffic = self._traffic
        messages = [{"role": "system", "content": " " * BYTES_PER_TOKEN * traffic.system_tokens}]
        for number in range(1, turn):
            messages.append(text("user", number, traffic.user_tokens))
            messages.append(text("assistant", number, traffic.answer_tokens))
        return [*messages, text("user", turn, traffic.user_tokens)]
