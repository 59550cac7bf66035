"""Requests made up from the OpenAPI description, good and bad ones: the server answers all, and never by a 5xx.

`FUZZ_EXAMPLES=200 pytest tests/serving/test_fuzz.py` makes up more, as CI does: so many good ones and bad ones of each
operation.
"""

import faulthandler
import os
import time
from collections import Counter

import hypothesis
import pytest

from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig

schemathesis = pytest.importorskip("schemathesis")

MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
LONGEST_S = 60  # of a request, on a machine with much else to do; most take some milliseconds
KNOWN = {"lora_path": "good", "lora_name": "good"}


def fuzz(app, known, *, max_examples):
    """Returns how many requests there were: so many of each operation that takes input, good ones and bad ones."""
    num_requests = Counter()

    def check(case):
        if isinstance(case.body, dict):  # else hardly anything would get past the first check
            case.body |= {name: value for name, value in known.items() if isinstance(case.body.get(name), str)}
            if case.operation.path.endswith("completions"):  # answers need not be long
                for name in ("max_tokens", "max_completion_tokens"):
                    if isinstance(limit := case.body.get(name), int):
                        case.body[name] = min(limit, 3)
                if case.body.get("max_completion_tokens") is None and case.body.get("max_tokens") is None:
                    case.body["max_tokens"] = 3
        faulthandler.dump_traceback_later(2 * LONGEST_S, exit=True)  # a call that never ends is not waited for
        begin_s = time.perf_counter()
        response = case.call()
        faulthandler.cancel_dump_traceback_later()
        assert time.perf_counter() - begin_s < LONGEST_S, case.as_curl_command()
        assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        num_requests[case.operation.label, mode.name] += 1

    settings = hypothesis.settings(
        max_examples=max_examples,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    operations = [result.ok() for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        for mode in MODES:
            cases = operation.as_strategy(generation_mode=mode)
            run = settings(hypothesis.seed(0)(hypothesis.given(case=cases)(check)))
            try:
                run()
            except hypothesis.errors.Unsatisfiable:
                assert mode is MODES[1]  # it takes no input that could be wrong
    for (operation, mode), number in num_requests.items():  # what takes no input is asked once
        assert number == (max_examples if operation.startswith("POST") or "{" in operation else 1), (operation, mode)
    return num_requests.total()


@pytest.fixture
def folder(tmp_path, make_adapter):
    make_adapter(seed=1).write(tmp_path / "good")
    return str(tmp_path)


def test_no_request_makes_the_server_fail(make_app, folder, engine):
    num_requests = fuzz(
        make_app(adapter_folders=(folder,)), KNOWN | {"model": "demo"}, max_examples=int(EXAMPLES or 80)
    )
    assert num_requests > 500
    assert len(engine.requests) > 50
    assert engine.running == []


def test_nor_the_engine_behind_it(m, folder):
    engine = Engine(m, EngineConfig(kv_cache_bytes=1 << 22))
    app = create_app(engine, ServeConfig(bank="tiny", adapter_folders=(folder,)))
    before = engine.adapters()
    try:
        fuzz(app, KNOWN | {"model": "tiny", "lora_path": "nowhere"}, max_examples=int(EXAMPLES or 40))
        assert engine.stats().num_generated_tokens > 20
        assert engine.stats().num_failed_steps == 0
        engine.clear_cache()  # refused while something runs
    finally:
        engine.close()
    assert engine.adapters() == before
