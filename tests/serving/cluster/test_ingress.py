"""What an ingress does by itself, in front of replicas that are made up."""

import json

import pytest

from molora.serving.cluster.http_call import VERSION_HEADER, HttpHead, answer
from molora.serving.cluster.prefixes import NO_PREFIX, prefix_of
from molora.serving.config import Limits, ServeConfig

pytestmark = pytest.mark.usefixtures("ray_is_imported")

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
    assert (sent.prefix, sent.adapters) == (prefix_of(BODY), set())
    assert sent.adapters_version == 0
    post({"messages": 3, "model": "demo:x"}, path="/tokenize")
    assert (handle.calls[1].prefix, handle.calls[1].adapters) == (NO_PREFIX, set())


def test_a_request_is_passed_on_with_the_adapters_that_it_names(post, handle):
    post(BODY | {"model": "demo:x"})
    post(BODY | {"model": "demo", "route": {"x": 0.5, "y": 0.5}})
    assert [call.adapters for call in handle.calls] == [{"x"}, {"x", "y"}]


def test_the_id_is_left_to_the_proxy_which_adds_it_to_every_answer(ingress, call, handle):
    handle.parts = [HttpHead(200, ((b"x-request-id", b"mine"), (b"x-other", b"mine"))), b"answer"]
    for key, status in (("key", 200), ("other", 401)):
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
        response = call(ingress, "GET", "/v1/models", headers=headers)
        assert (response.status_code, "x-request-id" in response.headers) == (status, False)
        assert ("x-other" in response.headers) == (status == 200)


@pytest.mark.parametrize("sent", [[], ["a b"], ["one", "two"]])
def test_an_id_is_made_where_none_that_fits_was_sent_and_the_replica_gets_it(ingress, call, handle, sent):
    headers = [("Authorization", "Bearer key"), *(("X-Request-Id", value) for value in sent)]
    made = call(ingress, "GET", "/v1/models", headers=headers).headers["x-request-id"]
    assert len(made) == 32
    assert [value for name, value in handle.calls[0].headers if name == b"x-request-id"] == [made.encode()]


class Behind(Handle):
    """In front of a replica's app, in this process."""

    def __init__(self, app):
        super().__init__()
        self._app = app

    def remote(self, call):
        return Parts(answer(self._app, call))


class Parts:
    def __init__(self, parts):
        self._parts = parts

    def __aiter__(self):
        return self._parts

    def cancel(self):
        pass


@pytest.fixture
def whole(make_app, tracer):
    from molora.serving.cluster.ingress import create_ingress

    config = ServeConfig(bank="demo", api_keys=("key",))
    return create_ingress(Behind(make_app(api_keys=("key",), tracer=tracer)), config, tracer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", URL, 200), ("GET", "/v1/models/{model_id:path}", 404), ("GET", "unknown", 404)],
)
def test_both_log_a_request_by_one_id_and_path(whole, call, lines, method, path, status):
    url = path.replace("{model_id:path}", "a-secret").replace("unknown", "/a-secret")
    headers = {"Authorization": "Bearer key", "X-Request-Id": "mine"}
    assert call(whole, method, url, json=BODY | {"model": "demo"}, headers=headers).status_code == status
    found = [json.loads(line) for line in lines if "molora.requests" in line]
    assert [(line["request_id"], line["path"], line["status"]) for line in found] == [("mine", path, status)] * 2
    assert ["completion_tokens" in line for line in found] == [path == URL, False]


def test_the_span_of_a_replica_is_in_that_of_the_ingress(whole, call, spans):
    headers = {"Authorization": "Bearer key", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    call(whole, "POST", URL, json=BODY | {"model": "demo"}, headers=headers)
    *_, inner, outer = spans.get_finished_spans()
    assert (inner.name, outer.name) == (f"POST {URL}", f"POST {URL}")
    assert inner.parent.span_id == outer.context.span_id
    assert f"{outer.parent.span_id:016x}" == "b7ad6b7169203331"
    assert inner.attributes["molora.request_id"] == outer.attributes["molora.request_id"]


def test_who_reaches_no_replica_is_logged_too(post, lines, handle, errors):
    post(key="other")
    handle.parts = [EVENTS, b"data: 1\n\n", errors["lost"]]
    post()
    handle.parts = [errors["full"]]
    post()
    refused, warned, lost, full = map(json.loads, lines)
    assert [line["status"] for line in (refused, lost, full)] == [401, 200, 429]
    assert (warned["level"], warned["request_id"]) == ("warning", lost["request_id"])
    assert "was lost" in warned["message"]


@pytest.mark.parametrize("error", ["lost", "failed", "other"])
def test_secrets_are_in_no_line_and_no_span(whole, post, call, handle, errors, lines, spans, error):
    body = BODY | {"model": "demo", "user": "a-secret", "cache_salt": "a-secret"}
    body["messages"] = [{"role": "user", "content": "a-secret"}]
    for key in ("key", "a-secret"):
        call(whole, "POST", f"{URL}?a-secret", json=body, headers={"Authorization": f"Bearer {key}"})
    handle.parts = [errors[error]]
    post(body)
    assert len([line for line in lines if "molora.requests" in line]) == 4
    told = "\n".join([*lines, *(span.to_json() for span in spans.get_finished_spans())])
    assert "molora.request_id" in told
    assert "secret" not in told


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
