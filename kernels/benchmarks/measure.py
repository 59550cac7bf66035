"""Check, then time: one case at one dtype gives one row of the result."""

import gc
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from molora_kernels import make_plan, routed_linear
from torch import Tensor

from benchmarks.backward import TRAINING_BASELINES, base_training_calls, our_training, peak_bytes
from benchmarks.methods import BASELINES, Impl, Kind, Method, base_calls, our_method
from benchmarks.problem import LIMITS, LOOSER, Problem, draw_problem, poison_free_memory, relative_error, solve
from benchmarks.roofline import Cost, Roofline, backward_cost, base_cost, forward_cost
from benchmarks.shapes import Case
from benchmarks.timing import Burst, Timer, quartiles

PLANS_IN_A_BURST = 32
Row = dict[str, Any]


class WrongResultError(Exception):
    pass


@dataclass(frozen=True)
class Bench:
    """How to measure; `roofline` is None where none is known (a CPU)."""

    timer: Timer
    roofline: Roofline | None
    impls: list[Impl]
    public: list[Method]
    seed: int

    def measure(self, case: Case, dtype_name: str) -> Row:
        """Time every method that can compute the case.

        Raises:
            WrongResultError: ours or plain torch is off by more than the limit. A public kernel that is wrong or
                fails is reported in the row and not timed.
        """
        gc.collect()
        num_layers = 1 if case.kind == "plan" else None
        device, dtype = self.timer.device, getattr(torch, dtype_name)
        problem = draw_problem(case.shape, dtype, device, self.seed, num_layers)
        row = {"kind": case.kind, "shape": str(case.shape), **asdict(case.shape), "dtype": dtype_name}
        row |= {"num_layers": len(problem.layers), "adapters_in_use": problem.adapters_in_use}
        measure = {"forward": self._forward, "backward": self._backward, "plan": self._plan}[case.kind]
        row |= measure(problem, dtype_name)
        for name, entry in row["methods"].items():
            print(f"{case.kind} {case.shape} {dtype_name} {name}: {_describe(entry)}", flush=True)
        return row

    def _forward(self, problem: Problem, dtype_name: str) -> Row:
        methods = [*map(our_method, self.impls), *BASELINES, *self.public]
        costs = (problem.shape, problem.x.itemsize, problem.adapters_in_use, problem.routed)
        floor_us = self._floor_us(forward_cost(*costs))
        with torch.inference_mode():
            base = self.timer.load(base_calls(problem), floor_us)
            entries: dict[str, Row] = {}
            bursts: dict[str, Burst] = {}
            for method in methods:
                if problem.shape.top_k > 1 and not method.gated:
                    entries[method.name] = {"skipped": "takes one adapter a token"}
                    continue
                try:
                    errors, bursts[method.name] = self._check_forward(problem, method, dtype_name, floor_us)
                    entries[method.name] = {"relative_error": errors}
                except Exception as error:
                    if method.kind != "public":
                        raise
                    entries[method.name] = {"failed": f"{type(error).__name__}: {error}"}
            self._compare(base, bursts, entries)
        base_floor_us = self._floor_us(base_cost(problem.shape, problem.x.itemsize))
        return {"floor_us": floor_us, "base_floor_us": base_floor_us, "methods": entries}

    def _check_forward(
        self, problem: Problem, method: Method, dtype_name: str, floor_us: float | None
    ) -> tuple[dict[str, float], Burst]:
        """Check a call by itself in poisoned memory, and then what the burst that is timed has left."""
        gates = problem.gates if method.gated else torch.ones_like(problem.gates)
        widths, layer = problem.shape.out_features, problem.layers[-1]
        expected = solve(problem.x, layer, problem.scaling, gates, problem.ids, widths)
        calls = method.prepare(problem)
        calls[-1]()  # compiled, and its library's workspaces taken
        poison_free_memory(self.timer.device)
        errors = {"y": relative_error(_merge(calls[-1]()), expected)}
        label = f"{problem.shape} {dtype_name} {method.name}"
        _require(errors, label, dtype_name, method.kind)
        burst = self.timer.load(calls, floor_us)
        errors["y as timed"] = relative_error(_merge(burst.output), expected)
        _require(errors, label, dtype_name, method.kind)
        return errors, burst

    def _backward(self, problem: Problem, dtype_name: str) -> Row:
        dy = torch.randn(problem.shape.tokens, sum(problem.shape.out_features), device=problem.x.device)
        dy = dy.to(problem.x.dtype)
        costs = (problem.shape, problem.x.itemsize, problem.adapters_in_use, problem.routed)
        floor_us = self._floor_us(backward_cost(*costs))
        of_base = base_training_calls(problem, dy)
        base = self.timer.load(of_base, floor_us)
        base_peak = peak_bytes(of_base[-1], self.timer.device)
        expected = _solve_backward(problem, dy)
        entries: dict[str, Row] = {}
        bursts: dict[str, Burst] = {}
        for method in [*map(our_training, self.impls), *TRAINING_BASELINES]:
            calls = method.prepare(problem, dy)
            calls[-1]()
            poison_free_memory(self.timer.device)
            label = f"{problem.shape} {dtype_name} {method.name}, forward and backward"
            errors = _errors(method.named(calls[-1]()), expected)
            _require(errors, label, dtype_name, method.kind)
            peak = peak_bytes(calls[-1], self.timer.device)
            bursts[method.name] = self.timer.load(calls, floor_us)
            replayed = _errors(method.named(bursts[method.name].output), expected)
            errors |= {f"{name} as timed": error for name, error in replayed.items()}
            _require(errors, label, dtype_name, method.kind)
            entries[method.name] = {"relative_error": errors, "peak_bytes": peak}
            if peak is not None and base_peak is not None:
                entries[method.name]["peak_bytes_above_base"] = peak - base_peak
        self._compare(base, bursts, entries)
        entries["base"]["peak_bytes"] = base_peak
        return {"floor_us": floor_us, "methods": entries}

    def _plan(self, problem: Problem, dtype_name: str) -> Row:
        """`make_plan` alone, checked by what a linear makes of the plan."""
        calls = [partial(make_plan, problem.ids, problem.shape.adapters)] * PLANS_IN_A_BURST
        with torch.inference_mode():
            burst = self.timer.load(calls, None)
            layer, widths = problem.layers[0], problem.shape.out_features
            expected = solve(problem.x, layer, problem.scaling, problem.gates, problem.ids, widths)
            errors: dict[str, float] = {}
            for impl in self.impls:
                tensors = (problem.x, layer.weight, None, layer.lora_a, layer.lora_b, problem.scaling, problem.gates)
                errors[impl] = relative_error(routed_linear(*tensors, burst.output, impl=impl), expected)
            _require(errors, f"{problem.shape} {dtype_name} make_plan, by a linear", dtype_name, "ours")
            times = quartiles(self.timer.alone(burst))
        return {"methods": {"make_plan": {"relative_error": errors, "time_us": times}}}

    def _compare(self, base: Burst, bursts: dict[str, Burst], entries: dict[str, Row]) -> None:
        pairs = self.timer.beside(base, bursts)
        entries["base"] = {"time_us": quartiles([of_base for taken in pairs.values() for of_base, _ in taken])}
        for name, taken in pairs.items():
            entries[name]["time_us"] = quartiles([of_method for _, of_method in taken])
            entries[name]["above_base_us"] = quartiles([of_method - of_base for of_base, of_method in taken])
            entries[name]["ratio_to_base"] = quartiles([of_method / of_base for of_base, of_method in taken])

    def _floor_us(self, cost: Cost) -> float | None:
        return None if self.roofline is None else self.roofline.floor_us(cost)


def _describe(entry: Row) -> str:
    if "time_us" not in entry:
        return f"not timed: {entry.get('failed') or entry['skipped']}"
    text = f"{entry['time_us']['median']:.1f} us"
    return f"{text}, relative error {max(entry['relative_error'].values()):.1e}" if "relative_error" in entry else text


def _merge(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat(output, dim=1)


def _errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(result, expected[name].flatten()) for name, result in results.items()}


def _require(errors: dict[str, float], label: str, dtype_name: str, kind: Kind) -> None:
    limit = LIMITS[dtype_name] * (1 if kind == "ours" else LOOSER)
    wrong = {name: error for name, error in errors.items() if not error < limit}  # NaN is wrong too
    if wrong:
        found = ", ".join(f"{error:.1e} in {name}" for name, error in wrong.items())
        raise WrongResultError(f"{label}: relative error {found}; it must be below {limit:.0e}")


def _solve_backward(problem: Problem, dy: Tensor) -> dict[str, Tensor]:
    layer = problem.layers[-1]
    leaves = [tensor.double().requires_grad_() for tensor in (problem.x, layer.lora_a, layer.lora_b, problem.gates)]
    x, lora_a, lora_b, gates = leaves
    exact = layer._replace(lora_a=lora_a, lora_b=lora_b)
    y = solve(x, exact, problem.scaling, gates, problem.ids, problem.shape.out_features)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return dict(zip(("y", "x", "lora_a", "lora_b", "gates"), (y.detach(), *gradients), strict=True))
