"""Plans and results as a person reads them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from scaling.measured import FITTED_BATCHES, Point
from scaling.outlook import Outlook
from scaling.parts import ROUTINGS

KINDS = {
    "decode steps": "step",
    "prompts of 32,768 and 65,536 tokens": "a prompt of",
    "the first token after a history in the cache": "first token",
    "five answers after 32,768 tokens, one after the other": "5 answers of 16 tokens in turn",
    "five answers after 32,768 tokens, at once": "5 answers of 16 tokens in parallel",
    "128 requests of mixed lengths, 64 at once": "128 requests",
}  # of points, by how their names begin


def describe(gpu: Outlook) -> str:
    """A plan, a line for each figure."""
    gb, asked = 1e9, f"of {gpu.num_asked_adapters:,.1f} adapters that it is asked for"
    busy = f"of {gpu.load_s:.2f} s each: {gpu.loading:.0%} of the time"
    most = f"of {gpu.max_requests_per_s:.3g} that a GPU can answer: {gpu.computing:.0%}"
    rows = [
        ("GPUs", f"{gpu.num_gpus:,}", gpu.routing),
        ("adapter slots of each", f"{gpu.num_slots:,}", asked),
        ("memory", f"{gpu.base_bytes / gb:.1f} GB", "base"),
        ("", f"{gpu.slots_bytes / gb:.1f} GB", "adapter slots"),
        ("", f"{gpu.kv_bytes / gb:.1f} GB", f"KV cache: {gpu.kv_tokens:,} tokens"),
        ("adapter found in a slot", f"{gpu.slot_hit_rate:.1%}", "of requests"),
        ("adapters loaded", f"{gpu.loads_per_s:.3g} /s", busy),
        ("", f"{gpu.load_bytes_per_s / 1e6:,.1f} MB/s", "read by each GPU's server"),
        ("prompt found in the cache", f"{gpu.prefix_hit_rate:.1%}", f"{gpu.computed_tokens:,.0f} tokens are computed"),
        ("requests", f"{gpu.requests_per_s:.3g} /s", most),
        ("running at once", f"{gpu.batch:.1f}", f"on {gpu.num_busy_slots:.1f} adapters"),
        ("a token of an answer", f"{1e3 * gpu.token_s:.1f} ms", "with steps that read prompts"),
        ("first token", _first_token(gpu.first_token_s), "on average, the wait for adapters included"),
        ("tokens", f"{gpu.tokens_per_s:,.0f} /s", "of each GPU"),
    ]
    lines = [f"{name:26}{value:>12}  {more}" for name, value, more in rows]
    return "\n".join([*lines, *(f"does not work: {problem}" for problem in gpu.problems)])


def _first_token(seconds: float) -> str:
    return "-" if math.isinf(seconds) else f"{1e3 * seconds:.0f} ms"


def compare(points: Iterable[Point]) -> str:
    lines = [f"{'':52}{'measured':>12}{'predicted':>12}{'error':>8}"]
    for point in points:
        fitted = "  fitted" if point.fitted else ""
        lines.append(
            f"{point.what:52}{point.measured:9.2f} {point.unit}{point.predicted:9.2f} {point.unit}"
            f"{point.error:+8.1%}{fitted}"
        )
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """A result file, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    parts = [
        "# A fleet's points\n",
        f"`{result['command']}`\n",
        f"On {result['device']}, commit {result['commit']}. {versions}. Measured times are those of "
        f"`{result['measured']}`, commit {result['measured_commit']}.\n",
        "## Against measurement\n",
        against_measurement(result),
        "## GPUs that a load needs, by prefix / with affinity / with round-robin\n",
        needed(result),
        "## From 1 to 1,000 GPUs\n",
        from_one(result),
    ]
    return "\n".join(parts)


def against_measurement(result: dict[str, Any]) -> str:
    return markdown(
        ["time", "measured, ms", "predicted, ms", "error", ""],
        [
            [
                each["what"],
                f"{each['measured']:.4g}",
                f"{each['predicted']:.4g}",
                f"{each['error']:+.1%}",
                "fitted" if each["fitted"] else "",
            ]
            for each in result["points"]
        ],
    )


def from_one(result: dict[str, Any]) -> str:
    head = ["routing", "adapters", "GPUs", "slots", "adapter found", "loading", "MB/s read", "prompt found"]
    return markdown(
        [*head, "ms a token", "works"],
        [
            [
                each["routing"],
                f"{each['number']:,}",
                f"{each['num_gpus']:,}",
                each["num_slots"],
                f"{each['slot_hit_rate']:.3f}",
                f"{each['loading']:.0%}",
                f"{each['load_bytes_per_s'] / 1e6:.1f}",
                f"{each['prefix_hit_rate']:.3f}",
                f"{1e3 * each['token_s']:.1f}",
                "yes" if each["works"] else "NO",
            ]
            for each in result["grid"]
        ],
    )


def needed(result: dict[str, Any]) -> str:
    """GPUs by load and adapters, with each routing."""
    found = {(each["requests_per_s"], each["number"], each["routing"]): each["num_gpus"] for each in result["needed"]}
    loads = sorted({load for load, _, _ in found})
    numbers = sorted({number for _, number, _ in found})
    rows = []
    for number in numbers:
        cells = [" / ".join(f"{found[load, number, routing]:,}" for routing in ROUTINGS) for load in loads]
        rows.append([f"{number:,}", *cells])
    return markdown(["adapters", *(f"{load:,.0f} requests/s" for load in loads)], rows)


def constants(result: dict[str, Any]) -> str:
    """What was fitted, and on what."""
    costs, batches = result["fleet"]["costs"], ", ".join(map(str, FITTED_BATCHES))
    return markdown(
        ["constant", "value", "fitted on"],
        [
            [
                "`layer_s`",
                f"{1e6 * costs['layer_s']:.1f} us",
                f"steps of the base, batches {batches}, with the next one",
            ],
            ["`sequence_s`", f"{1e6 * costs['sequence_s']:.1f} us", "the same"],
            [
                "`adapted_layer_s`",
                f"{1e6 * costs['adapted_layer_s']:.1f} us",
                f"routed steps, uniform, batches {batches}",
            ],
            ["`flops_per_s`", f"{costs['flops_per_s'] / 1e12:.0f} TFLOP/s", "one prompt of 8,192 tokens"],
            ["`host_bytes_per_s`", f"{costs['host_bytes_per_s'] / 1e6:.0f} MB/s", "four loads, all of one size"],
        ],
    )


def held_out(result: dict[str, Any]) -> str:
    """The range of errors of each kind of point to which nothing was fitted."""
    rows = []
    for label, beginning in KINDS.items():
        errors = [
            each["error"] for each in result["points"] if each["what"].startswith(beginning) and not each["fitted"]
        ]
        low, high = (f"{value:+.1%}" for value in (min(errors), max(errors)))
        rows.append([label, len(errors), low if low == high else f"{low} to {high}"])
    return markdown(["held out", "points", "predicted over measured"], rows)
