"""What docs/ray.md says of the hit rate is what was measured."""

import json
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_docs_say_what_was_measured() -> None:
    text = " ".join((REPOSITORY / "docs" / "ray.md").read_text().split())
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "prefix-routing-cpu.json").read_text())
    of_one, settings = record["of_one_replica"], record["settings"]
    assert of_one["two, by prefix"] >= 0.9
    assert f"find {of_one['two, by prefix']:.3f} of the share" in text
    assert f"and {of_one['two, in turn']:.3f} of it where" in text
    num_conversations = settings["tenants"] * settings["conversations"]
    assert f"{num_conversations} conversations of {settings['tenants']} tenants and {settings['turns']} turns" in text
    assert f"{settings['at_once']} at a time" in text
    assert record["commit"]
    assert all(len(record["results"][name]["num_requests"]) == 2 for name in ("two, by prefix", "two, in turn"))
