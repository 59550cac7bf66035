"""What is measured: shapes, their routes, and the named suites. Knows nothing about how."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

ROUTES = ("uniform", "zipf", "one", "distinct", "skewed", "none")
SYNTAX = (
    "TOKENSxINxOUTxRANKxADAPTERSxROUTES, with xTOPK behind it for a blend; OUT is a sum (4096+1024+1024) for linears "
    f"that share an input, ROUTES one of {', '.join(ROUTES)}"
)
_PATTERN = re.compile(
    r"(?P<tokens>\d+)x(?P<in>\d+)x(?P<out>\d+(\+\d+)*)x(?P<rank>\d+)x(?P<adapters>\d+)x(?P<routes>[a-z]+)(x(?P<top_k>\d+))?"
)


@dataclass(frozen=True)
class Shape:
    """One linear, or siblings that share an input, and the routes of its tokens."""

    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    adapters: int
    routes: str
    top_k: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read `SYNTAX`.

        Raises:
            ValueError: text is something else, a size is zero, or a token would need more adapters than there are.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or match["routes"] not in ROUTES:
            raise ValueError(f"{text!r} is not a shape; it must be {SYNTAX}")
        tokens, in_features, rank, adapters = (int(match[name]) for name in ("tokens", "in", "rank", "adapters"))
        widths, top_k = tuple(map(int, match["out"].split("+"))), int(match["top_k"] or 1)
        if min(tokens, in_features, *widths, rank, top_k) < 1 or adapters < top_k:
            raise ValueError(f"{text!r}: sizes must be at least 1, and ADAPTERS at least TOPK")
        return cls(tokens, in_features, widths, rank, adapters, match["routes"], top_k)

    def __str__(self) -> str:
        widths = "+".join(map(str, self.out_features))
        text = f"{self.tokens}x{self.in_features}x{widths}x{self.rank}x{self.adapters}x{self.routes}"
        return text if self.top_k == 1 else f"{text}x{self.top_k}"

    def draw_ids(self) -> Tensor:
        """[tokens, top_k] int32 on the CPU; a token's adapters are distinct, as a router's top-k are."""
        size = (self.tokens, self.top_k)
        if self.routes == "none":
            return torch.full(size, -1, dtype=torch.int32)
        if self.routes == "one":
            return torch.arange(self.top_k, dtype=torch.int32).expand(size).contiguous()
        if self.routes == "distinct":  # each token another adapter than its neighbours
            ids = torch.arange(self.tokens)[:, None] + torch.arange(self.top_k)
            return (ids % self.adapters).int()
        weights = {
            "uniform": torch.ones(self.adapters),
            "zipf": 1 / torch.arange(1, self.adapters + 1),
            "skewed": torch.tensor([0.9] + [0.1 / max(1, self.adapters - 1)] * (self.adapters - 1)),
        }[self.routes]
        return torch.multinomial(weights.expand(self.tokens, -1), self.top_k).int()


@dataclass(frozen=True)
class Case:
    kind: Literal["forward", "backward", "plan"]
    shape: Shape


def forward_cases(shapes: Iterable[str]) -> list[Case]:
    return [Case("forward", Shape.parse(shape)) for shape in shapes]


def _peers() -> list[str]:
    """The rows of the table of public kernels that this package is measured against."""
    small, large = "16x8xuniform", "64x32xuniform"
    shapes = [f"{tokens}x4096x4096x{small}" for tokens in (1, 8, 32, 128, 1024, 4096, 8192)]
    shapes += [f"{tokens}x4096x4096x64x32xzipf" for tokens in (32, 256, 4096)]
    shapes += [f"{tokens}x4096x14336x{small}" for tokens in (1, 256, 4096)]
    shapes += [f"{tokens}x2048x2048x{small}" for tokens in (1, 32, 256)]
    shapes += ["4096x4096x4096x16x8xone"]
    shapes += [f"{tokens}x4096x4096x32x4xuniform" for tokens in (128, 1024)]
    shapes += [f"{tokens}x4096x14336x{large}" for tokens in (32, 8192)]
    return shapes + [f"{tokens}x2048x2048x64x8xzipf" for tokens in (8, 8192)]


def _prefill() -> list[str]:
    shapes = [f"{tokens}x4096x4096x16x8xuniform" for tokens in (1024, 4096, 8192)]
    shapes += [f"{tokens}x4096x14336x16x8xuniform" for tokens in (4096, 8192)]
    shapes += [f"{tokens}x4096x4096x64x32xzipf" for tokens in (256, 512, 1024, 2048, 4096, 8192)]
    return [*shapes, "8192x4096x14336x64x32xuniform"]


TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIBLINGS = ("4096x4096+1024+1024", "4096x14336+14336")  # q, k, v and gate, up of Llama-3.1-8B
ODD = (
    "1x5120x13824x24x12xuniform",
    "48x5120x13824x8x3xuniform",
    "48x5120x13824x24x12xuniform",
    "48x4096x4096x8x12xuniform",
    "200x5120x13824x8x12xuniform",
    "2000x4096x4096x24x3xuniform",
    "2000x5120x13824x8x12xuniform",
    "2000x5120x13824x24x3xuniform",
)

SUITES: dict[str, list[Case]] = {
    "peers": forward_cases(_peers()),
    "tokens": forward_cases(f"{tokens}x4096x4096x16x8xuniform" for tokens in TOKENS),
    "prefill": forward_cases(_prefill()),
    "routes": forward_cases(
        f"{tokens}x4096x4096x{bank}x{routes}"
        for bank, tokens, routes in product(("16x8", "64x32"), (32, 256, 4096), ROUTES)
    ),
    "topk": forward_cases(
        f"{tokens}x4096x4096x{bank}xuniformx{top_k}"
        for bank, tokens, top_k in product(("16x8", "64x32"), (1, 32, 128, 1024, 4096), (1, 2))
    ),
    "siblings": forward_cases(
        f"{tokens}x{group}x16x8xuniform" for group, tokens in product(SIBLINGS, (1, 8, 32, 256, 4096))
    ),
    "odd": forward_cases(ODD),
    "plan": [  # the linear is only there to check the plan by
        Case("plan", Shape(tokens, 64, (64,), 16, 8, "uniform", top_k))
        for tokens, top_k in product((1, 32, 1024, 8192), (1, 2))
    ],
    "backward": [
        Case("backward", Shape(tokens, 4096, (4096,), rank, adapters, "uniform"))
        for rank, adapters in ((16, 8), (64, 32))
        for tokens in (1024, 4096, 8192)
    ],
    "tiny": [  # every kind of case, in seconds on a CPU
        *forward_cases(["1x256x256x8x4xuniform", "64x256x256x8x4xuniform", "64x256x256x8x4xskewedx2"]),
        *forward_cases(["8x256x128+64+64x8x4xuniform", "8x256x256x8x4xnone"]),
        Case("backward", Shape(64, 256, (256,), 8, 4, "uniform")),
        Case("plan", Shape(64, 64, (64,), 8, 4, "uniform", 2)),
    ],
}
