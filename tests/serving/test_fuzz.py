"""Requests made up from the OpenAPI description, good and bad ones: the server answers all, and never by a 5xx."""

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")

MAX_EXAMPLES = 60
KNOWN = {"model": "demo", "lora_path": "good", "lora_name": "good"}


@pytest.fixture
def described(make_app, tmp_path, make_adapter):
    make_adapter(seed=1).write(tmp_path / "good")
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(adapter_folders=(str(tmp_path),)))


def test_no_request_makes_the_server_fail(described, engine):
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) >= 11
    num_cases = 0

    def check(case):
        nonlocal num_cases
        num_cases += 1
        if isinstance(case.body, dict):  # else hardly anything would get past the first check
            case.body |= {name: value for name, value in KNOWN.items() if isinstance(case.body.get(name), str)}
        response = case.call()
        assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                run = hypothesis.given(case=strategy)(check)
                run = hypothesis.seed(0)(run)
                run = hypothesis.settings(
                    max_examples=MAX_EXAMPLES,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(hypothesis.HealthCheck),
                    phases=[hypothesis.Phase.generate],
                )(run)
                run()
            except hypothesis.errors.Unsatisfiable:
                assert mode is schemathesis.GenerationMode.NEGATIVE  # it takes no input that could be wrong
    assert num_cases > 500
    assert len(engine.requests) > 50
    assert engine.running == []
