"""Check attention over pages against float64, then time it beside torch's own attention.

    python benchmarks/attention.py --out benchmarks/results/attention.json
    python benchmarks/attention.py --cases decode --shape rows=16 --shape keys=128,num_stages=2  # other cuts
    TRITON_INTERPRET=1 python benchmarks/attention.py --check-only                   # no GPU: tiny cases

`ours` reads a pool whose blocks lie in random order. `sdpa` is F.scaled_dot_product_attention on the same keys side by
side; `varlen` is torch's varlen_attn, on the pool where it takes block tables and side by side where it does not. A
call is timed by CUDA-graph replay over layers enough for the keys to come from memory. Heads are Llama-3.1-8B's.
"""

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.machine import describe_machine
from benchmarks.timing import Timer, quartiles
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from molora.serving import paged_attention as pages

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
BYTES_PER_S, FLOPS_PER_S = 4.25e12, 790e12  # what an H200 reaches, to choose how long a sample is
COLD_BYTES = 1 << 28  # of keys and values in turn: several times the L2 cache


@dataclass(frozen=True)
class Case:
    kind: str
    num_sequences: int
    num_queries: int  # of each
    num_keys: int  # of each
    num_heads: int = 8
    group: int = 4
    head_size: int = 128
    num_shared: int = 0  # keys that all sequences begin with, in the same blocks

    def __str__(self) -> str:
        return f"{self.kind} {self.num_sequences} x {self.num_queries} at {self.num_keys - self.num_queries}"

    @property
    def flops(self) -> int:
        pairs = self.num_queries * self.num_keys - self.num_queries * (self.num_queries - 1) // 2
        return 4 * self.num_sequences * self.num_heads * self.group * self.head_size * pairs

    def num_bytes(self, item_bytes: int) -> int:
        """Keys and values once, queries and outputs."""
        num_keys = self.num_sequences * (self.num_keys - self.num_shared) + self.num_shared
        rows = num_keys * self.num_heads + self.num_sequences * self.num_queries * self.num_heads * self.group
        return 2 * rows * self.head_size * item_bytes


CASES = [
    *(Case("decode", S, 1, L) for S in (1, 8, 64) for L in (1024, 8192, 32768, 65536)),
    *(Case("extension", 1, 16, L + 16) for L in (8192, 32768, 65536)),
    *(Case("shared", S, 1, L + 16, num_shared=L) for S in (5, 64) for L in (8192, 32768)),
    *(Case("chunk", 1, n, before + n) for n in (2048, 8192) for before in (0, 32768)),
]
TINY = [
    Case("decode", 3, 1, 70, num_heads=2, head_size=16),
    Case("extension", 2, 5, 40, num_heads=2, head_size=16),
    Case("shared", 5, 1, 200, num_heads=2, head_size=16, num_shared=160),
    Case("chunk", 1, 40, 60, num_heads=1, group=2, head_size=32),
]


class Problem:
    """The tensors of a case: keys and values of several layers, side by side and in a pool."""

    def __init__(
        self, case: Case, num_layers: int, block_size: int, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        self.case = case
        rng = torch.Generator(device).manual_seed(seed)
        S, n, L, H, D = case.num_sequences, case.num_queries, case.num_keys, case.num_heads, case.head_size
        self.q_NHD = torch.randn(S * n, H * case.group, D, generator=rng, dtype=dtype, device=device)
        blocks = -(-L // block_size)
        tables_SM = torch.randperm(S * blocks, generator=rng, device=device).view(S, blocks)
        key_L = torch.arange(L, device=device)
        places_SL = tables_SM[:, key_L // block_size] * block_size + key_L % block_size
        shared = case.num_shared // block_size * block_size
        tables_SM[1:, : shared // block_size] = tables_SM[0, : shared // block_size]
        places_SL[1:, :shared] = -1
        self.cu_queries_S1, self.cu_keys_S1 = (
            torch.arange(0, (S + 1) * step, step, dtype=torch.int32, device=device) for step in (n, L)
        )
        num_keys_S = torch.full((S,), L, dtype=torch.int32, device=device)
        self.tables = pages.BatchTables(tables_SM.int(), self.cu_queries_S1, num_keys_S)
        self.layers = []
        for _ in range(num_layers):
            k, v = (torch.randn(S * L, H, D, generator=rng, dtype=dtype, device=device) for _ in "kv")
            for rows in (k.unflatten(0, (S, L)), v.unflatten(0, (S, L))):
                rows[1:, :shared] = rows[0, :shared]
            k_pool, v_pool = (
                torch.full((S * blocks, block_size, H, D), math.nan, dtype=dtype, device=device) for _ in "kv"
            )
            pages.write_kv(k, v, k_pool, v_pool, places_SL.flatten())
            self.layers.append((k, v, k_pool, v_pool))

    def solve(self) -> Tensor:
        """The first layer in float64, by sequence, head and a thousand queries at a time."""
        case, (k, v, _, _) = self.case, self.layers[0]
        n, L, G = case.num_queries, case.num_keys, case.group
        out = torch.empty_like(self.q_NHD, dtype=torch.float64)
        key_L = torch.arange(L, device=k.device)
        for s in range(case.num_sequences):
            for h in range(case.num_heads):
                k_LD, v_LD = (rows[s * L : (s + 1) * L, h].double() for rows in (k, v))
                for first in range(0, n, 1024):
                    end = min(first + 1024, n)
                    at = slice(s * n + first, s * n + end), slice(h * G, (h + 1) * G)
                    scores = self.q_NHD[at].double() @ k_LD.T * case.head_size**-0.5
                    seen = key_L <= torch.arange(L - n + first, L - n + end, device=k.device)[:, None]
                    out[at] = scores.masked_fill_(~seen[:, None], -math.inf).softmax(-1) @ v_LD
        return out


def make_ours(problem: Problem, overrides: dict[str, int]) -> Callable[[int], Tensor]:
    case, q, tables = problem.case, problem.q_NHD, problem.tables
    max_keys = tables.block_tables_SM.shape[1] * problem.layers[0][2].shape[1]
    sizes = case.num_heads, case.group, (case.head_size, case.head_size), q.element_size(), max_keys
    shape = pages.choose_shape(len(q), case.num_sequences, *sizes, pages.describe(q.device))
    shape = replace(shape, **overrides)

    def call(layer: int) -> Tensor:
        _, _, k_pool, v_pool = problem.layers[layer]
        return pages.paged_attention(q, k_pool, v_pool, tables, scale=case.head_size**-0.5, shape=shape)

    return call


def make_sdpa(problem: Problem) -> Callable[[int], Tensor]:
    case = problem.case
    S, n, L = case.num_sequences, case.num_queries, case.num_keys
    q_SHnD = problem.q_NHD.unflatten(0, (S, n)).transpose(1, 2)
    mask = None if n == 1 else causal_lower_right(n, L)

    def call(layer: int) -> Tensor:
        k, v = (rows.unflatten(0, (S, L)).transpose(1, 2) for rows in problem.layers[layer][:2])
        out = F.scaled_dot_product_attention(q_SHnD, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def make_varlen(problem: Problem) -> Callable[[int], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    case, tables, known = problem.case, problem.tables, inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    paged = "block_table" in known
    if paged:
        options |= {"block_table": tables.block_tables_SM, "seqused_k": tables.num_keys_S}

    def call(layer: int) -> Tensor:
        k, v, k_pool, v_pool = problem.layers[layer]
        rows = (
            (k_pool, v_pool, problem.cu_queries_S1, None)
            if paged
            else (k, v, problem.cu_queries_S1, problem.cu_keys_S1)
        )
        return varlen_attn(problem.q_NHD, *rows, case.num_queries, case.num_keys, **options)

    return call


def methods(problem: Problem, shapes: list[dict[str, int]], on_gpu: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, each as a name and what makes its call."""
    yield "ours", lambda: make_ours(problem, {})
    for overrides in shapes:
        name = ",".join(f"{key}={value}" for key, value in overrides.items())
        yield f"ours {name}", lambda overrides=overrides: make_ours(problem, overrides)
    yield "sdpa", lambda: make_sdpa(problem)
    if on_gpu:
        yield "varlen", lambda: make_varlen(problem)


def measure(problem: Problem, shapes: list[dict[str, int]], timer: Timer | None) -> dict[str, Any]:
    """Of each method the error against float64 and, with a timer, microseconds a call.

    Raises:
        SystemExit: our result is wrong. Another's failure is a row of its own.
    """
    case, item_bytes = problem.case, problem.q_NHD.element_size()
    num_bytes, flops = case.num_bytes(item_bytes), case.flops
    floor_us = max(num_bytes / BYTES_PER_S, flops / FLOPS_PER_S) * 1e6
    row: dict[str, Any] = {
        "case": str(case),
        "num_bytes": num_bytes,
        "flops": flops,
        "floor_us": floor_us,
        "methods": {},
    }
    expected, limit = problem.solve(), LIMITS[problem.q_NHD.dtype]
    for name, make in methods(problem, shapes, timer is not None or problem.q_NHD.is_cuda):
        try:
            call = make()
            error = float((call(0).double() - expected).norm() / expected.norm())
            entry: dict[str, Any] = {"error": error}
            if not error <= limit:
                raise ArithmeticError(f"{name} is wrong in {case}: its error is {error:.2g}, the limit {limit:.2g}")
            if timer is not None:
                burst = timer.load([partial(call, layer) for layer in range(len(problem.layers))], floor_us)
                entry["time_us"] = quartiles(timer.alone(burst))
        except Exception as failure:
            if name.startswith("ours"):
                raise SystemExit(f"{name}, {case}: {failure!r}") from failure
            entry = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
        row["methods"][name] = entry
    return row


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["methods"])
    lines = [["case", "floor us", *names]]
    for row in rows:
        by_bytes = row["num_bytes"] / BYTES_PER_S > row["flops"] / FLOPS_PER_S
        cells = []
        for name in names:
            entry = row["methods"][name]
            if "failed" in entry:
                cells.append("failed")
            elif "time_us" not in entry:
                cells.append(f"error {entry['error']:.1e}")
            else:
                us = entry["time_us"]["median"]
                rate = (
                    f"{row['num_bytes'] / us / 1e3:.0f} GB/s" if by_bytes else f"{row['flops'] / us / 1e6:.0f} TFLOP/s"
                )
                cells.append(f"{us:.1f} ({rate})")
        lines.append([row["case"], f"{row['floor_us']:.1f}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def parse_shape(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=[""], metavar="TEXT", help="only those whose name holds one of these"
    )
    parser.add_argument(
        "--shape", action="append", default=[], type=parse_shape, help="fields of LaunchShape, a variant each"
    )
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.check_only:
        parser.error("there is no GPU to time. TRITON_INTERPRET=1 and --check-only check tiny cases without one.")
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    timer = None if args.check_only else Timer(device, args.repeats, args.pause_ms / 1e3)
    result = describe_machine(device) | {
        "seed": args.seed,
        "block_size": args.block_size,
        "dtype": str(dtype),
        "rows": [],
    }
    for case in CASES if on_gpu else TINY:
        if any(text in str(case) for text in args.cases):
            num_layers = 1 if timer is None else min(32, -(-COLD_BYTES // case.num_bytes(dtype.itemsize)))
            problem = Problem(case, num_layers, args.block_size, dtype, device.type, args.seed)
            result["rows"].append(measure(problem, args.shape, timer))
            if args.out:  # after every row: a long run may be cut short
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['device']}\n\n{table(result['rows'])}")


if __name__ == "__main__":
    main()
