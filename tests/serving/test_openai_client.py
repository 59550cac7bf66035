"""The official client library against a server on a socket."""

import asyncio
import time

import pydantic
import pytest

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def client(make_app, engine, listening):
    with (
        listening(make_app(api_keys=("the-key",))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="the-key", max_retries=0) as client,
    ):
        yield client
    assert engine.running == []


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo", "org/base", "demo:maths", "demo:code"]
    assert models[2].model_extra["parent"] == "org/base"
    assert client.models.retrieve("org/base").id == "org/base"


def test_chat(client, engine):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, seed=1, extra_body={"return_routes": True}
    )
    assert [choice.message.content for choice in answer.choices] == ["Per-token routing ✓"] * 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    entry = answer.choices[1].logprobs.content[0]
    assert (entry.logprob, entry.top_logprobs[0].logprob) == (-0.5, -0.25)
    assert entry.model_extra["route"]["adapters"][0] == ["maths", 0.75]
    assert answer.model_extra["molora"]["num_recomputed_tokens"] == 0


def test_chat_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="demo:maths", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, usage = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "Per-token routing ✓"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.completion_tokens == 6


def test_the_librarys_own_accumulation(client):
    with client.chat.completions.stream(model="demo", messages=MESSAGES, n=2, logprobs=True) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == ["Per-token routing ✓"] * 2
    assert [len(choice.logprobs.content) for choice in answer.choices] == [6, 6]


def test_structured_answers(client, engine):
    class Place(pydantic.BaseModel):
        name: str

    engine.words = ('{"name"', ': "Ulm"}')
    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Place)
    assert answer.choices[0].message.parsed == Place(name="Ulm")
    assert engine.requests[-1].sampling.grammar.kind == "json_schema"


def test_completions(client):
    answer = client.completions.create(model="org/base", prompt=[[5, 6], [7]], echo=True, logprobs=1, max_tokens=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    chunks = list(client.completions.create(model="org/base", prompt="one", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Per-token routing ✓"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_errors(client, engine):
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[{"type": "function"}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "x"}, cast_to=object)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    engine.max_running = 0
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES)
    assert caught.value.response.headers["retry-after"] == "2"
    engine.stopped = True
    with pytest.raises(openai.InternalServerError, match="the server is stopping"):
        client.chat.completions.create(model="demo", messages=MESSAGES)


def test_leaving_a_stream_over_a_socket(client, engine):
    engine.words = ("a", *"bcdefgh" * 100)

    async def slowly(position):
        await asyncio.sleep(0.02)

    engine.before_token = slowly
    with client.chat.completions.create(model="demo", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 5
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.log == ["submit", "cancel"]
