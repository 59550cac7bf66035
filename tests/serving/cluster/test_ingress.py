"""What an ingress does by itself, in front of replicas that are made up."""

import json
import warnings

import pytest

from molora.serving.cluster.http_call import VERSION_HEADER, HttpHead
from molora.serving.cluster.prefixes import NO_PREFIX, prefix_of
from molora.serving.config import Limits, ServeConfig

URL = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello there"}], "cache_salt": "mine"}
EVENTS = HttpHead(200, ((b"content-type", b"text/event-stream; charset=utf-8"), (VERSION_HEADER, b"3")))
WHOLE = HttpHead(200, ((b"content-type", b"application/json"), (b"content-length", b"6")))


class Answer:
    """As a handle's streaming response: some parts, then an error or the end."""

    def __init__(self, parts):
        self._parts = iter(parts)
        self._error = None
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        part = next(self._parts, None)
        if part is None:
            raise StopAsyncIteration
        if isinstance(part, Exception):
            self._error = part
            raise part
        return part

    def cancel(self):
        self.is_cancelled = True
        if self._error is not None:
            raise self._error  # as Ray does, of a request that no replica has got


class Handle:
    """As a deployment's handle, with a method `answer`."""

    def __init__(self):
        self.parts = [WHOLE, b"answer"]
        self.calls = []
        self.answers = []

    def options(self, **options):
        assert options == {"stream": True}
        return self

    @property
    def answer(self):
        return self

    def remote(self, call):
        self.calls.append(call)
        self.answers.append(Answer(self.parts))
        return self.answers[-1]

    def broadcast(self, method):
        assert method == "metrics"
        return self

    async def results_async(self, *, timeout_s, return_exceptions):
        assert timeout_s == 5
        assert return_exceptions
        if isinstance(self.metrics, Exception):
            raise self.metrics
        return self.metrics


@pytest.fixture(scope="module", autouse=True)
def quiet_import():
    """Ray's own modules warn when they are imported, which takes seconds and so is left to those who run a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve  # noqa: F401


@pytest.fixture(scope="module")
def errors():
    from ray.exceptions import ActorUnavailableError, RayTaskError, TaskCancelledError
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    return {
        "lost": ActorUnavailableError("gone", b"\0" * 16),
        "full": BackPressureError(5, 5),
        "none": DeploymentUnavailableError(DeploymentID("Replica")),
        "cancelled": TaskCancelledError(),
        "failed": RayTaskError("answer", "a secret of the server", ValueError("a secret of the server")),
        "other": ValueError("a secret of the server"),
    }


@pytest.fixture
def handle():
    return Handle()


@pytest.fixture
def ingress(handle):
    from molora.serving.cluster.ingress import create_ingress

    return create_ingress(handle, ServeConfig(bank="demo", api_keys=("key",), limits=Limits(max_body_bytes=1000)))


@pytest.fixture
def post(ingress, call):
    def post(body=BODY, *, path=URL, key="key"):
        return call(ingress, "POST", path, content=json.dumps(body), headers={"Authorization": f"Bearer {key}"})

    return post


def test_a_request_is_passed_on_with_its_prefix(post, handle):
    response = post()
    assert (response.status_code, response.text) == (200, "answer")
    assert response.headers["x-frame-options"] == "DENY"
    sent = handle.calls[0]
    assert (sent.method, sent.path, sent.query, json.loads(sent.body)) == ("POST", URL, b"", BODY)
    assert sent.prefix == prefix_of(BODY)
    assert sent.adapters_version == 0
    post({"messages": 3}, path="/tokenize")
    assert handle.calls[1].prefix == NO_PREFIX


def test_the_id_is_left_to_the_proxy_which_adds_it_to_every_answer(ingress, call, handle):
    handle.parts = [HttpHead(200, ((b"x-request-id", b"mine"), (b"x-other", b"mine"))), b"answer"]
    for sent, answered in (("mine", None), ("yours", "mine")):
        headers = {"Authorization": "Bearer key", "X-Request-Id": sent}
        response = call(ingress, "GET", "/v1/models", headers=headers)
        assert (response.headers.get("x-request-id"), response.headers["x-other"]) == (answered, "mine")


def test_a_body_that_is_no_json_is_the_replica_s_to_refuse(ingress, call, handle):
    for content in (b"{", b"\xff", b'{"messages":' + b"[" * 400):
        headers = {"Authorization": "Bearer key"}
        assert call(ingress, "POST", URL, content=content, headers=headers).status_code == 200
        assert handle.calls[-1].prefix == NO_PREFIX


def test_who_has_no_key_or_sends_too_much_reaches_no_replica(post, handle):
    assert post(key="other").status_code == 401
    assert post({"messages": "x" * 2000}).status_code == 413
    assert handle.calls == []


def test_the_newest_version_is_told_to_the_next_replica(post, handle):
    handle.parts = [EVENTS, b"data: [DONE]\n\n"]
    post()
    handle.parts = [WHOLE, b"answer"]
    post()
    post()
    assert [call.adapters_version for call in handle.calls] == [0, 3, 3]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("lost", 503, "replica_lost"),
        ("full", 429, "rate_limit_exceeded"),
        ("none", 503, None),
        ("cancelled", 503, None),
        ("failed", 500, None),
        ("other", 500, None),
    ],
)
@pytest.mark.parametrize("head", [[], [WHOLE], [EVENTS]])
def test_what_fails_before_the_first_part_has_a_status(post, handle, errors, head, error, status, code):
    handle.parts = [*head, errors[error]]
    response = post()
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == (None if status == 500 else "1")
    assert "secret" not in response.text
    assert handle.answers[0].is_cancelled


def test_what_fails_in_a_stream_is_its_last_event(post, handle, errors):
    handle.parts = [EVENTS, b"data: 1\n\n", b"data: 2\n\n", errors["lost"]]
    response = post()
    assert response.status_code == 200
    *events, last, end = response.text.split("\n\n")
    assert (events, end) == (["data: 1", "data: 2"], "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_metrics_are_those_of_the_replicas_that_are_there(ingress, call, handle, errors):
    handle.metrics = [("one", "# TYPE molora:a gauge\nmolora:a 1\n"), errors["lost"]]
    response = call(ingress, "GET", "/metrics", headers={"Authorization": "Bearer key"})
    assert (response.status_code, response.text.splitlines()[-1]) == (200, 'molora:a{replica="one"} 1.0')
    handle.metrics = TimeoutError("of one that hangs")
    response = call(ingress, "GET", "/metrics", headers={"Authorization": "Bearer key"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "has not told its metrics within 5 s" in response.json()["error"]["message"]


def test_an_answer_without_a_body(post, handle):
    handle.parts = [HttpHead(204, ())]
    assert (post().status_code, post().content) == (204, b"")
