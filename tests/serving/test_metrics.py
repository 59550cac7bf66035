"""What Prometheus reads."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
URL = "/v1/chat/completions"


def read(call, app):
    """Samples by name and the labels beside the model's name, which all have."""
    response = call(app, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "demo"
            samples[sample.name, *labels.values()] = sample.value
    return samples


def reasons(samples):
    return {key[1]: value for key, value in samples.items() if key[0] == "molora:request_success_total"}


def test_what_the_engine_counts(app, call):
    samples = read(call, app)
    for name, value in {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 20,
        "prefix_cache_hits_total": 7,
        "num_preemptions_total": 0,
        "prompt_tokens_total": 20,
        "generation_tokens_total": 0,
        "recomputed_tokens_total": 0,
        "reencoded_tokens_total": 0,
        "replayed_tokens_total": 0,
    }.items():
        assert samples[(f"molora:{name}",)] == value
    assert samples["molora:adapter_tokens_total", "base"] == 5
    assert samples["molora:adapter_tokens_total", "maths"] == 9


def test_what_requests_took(app, call, engine):
    call(app, "POST", URL, json=CHAT)
    call(app, "POST", URL, json=CHAT | {"max_tokens": 2, "stream": True})
    samples = read(call, app)
    assert reasons(samples) == {"stop": 1, "length": 1, "abort": 0}
    assert samples[("molora:request_failures_total",)] == 0
    for name, total in {
        "time_to_first_token_seconds": 1.0,
        "e2e_request_latency_seconds": 2.0,
        "request_queue_time_seconds": 0.5,
        "request_generation_tokens": 8,
        "request_prompt_tokens": 2 * len(engine.m.render(CHAT["messages"]).token_ids),
    }.items():
        assert samples[(f"molora:{name}_count",)] == 2
        assert samples[(f"molora:{name}_sum",)] == total
    assert samples[("molora:inter_token_latency_seconds_count",)] == 5 + 1


def test_requests_that_did_not_end_well(app, call, engine, gate, connect, until):
    async def fail(position):
        raise RuntimeError

    async def leave():
        engine.before_token = held = gate(1)
        client = connect(app, URL, CHAT | {"stream": True})
        await held.reached.wait()
        client.left.set()
        await until(lambda: not engine.running)
        await client.finish()

    engine.before_token = fail
    call(app, "POST", URL, json=CHAT)
    asyncio.run(leave())
    samples = read(call, app)
    assert reasons(samples) == {"stop": 0, "length": 0, "abort": 1}
    assert samples[("molora:request_failures_total",)] == 1
    assert samples[("molora:e2e_request_latency_seconds_count",)] == 0


def test_each_server_has_its_own(app, make_app, call):
    call(app, "POST", URL, json=CHAT)
    assert reasons(read(call, make_app())) == {"stop": 0, "length": 0, "abort": 0}
