"""The whole server on a tiny random model: what clients get is what the model says, and what they leave is dropped."""

import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import torch

import molora
from molora.adapter import random_adapter
from molora.serving.app import create_app
from molora.serving.config import Limits, ServeConfig
from molora.serving.engine import Engine, EngineConfig

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]
ENDLESS = {"max_tokens": 700, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_adapter, linear_shapes):
    """Adapters may be loaded from here."""
    folder = tmp_path_factory.mktemp("loadable")
    make_adapter(seed=3).write(folder / "z")
    make_adapter(seed=4).write(folder / "other-z")
    make_adapter(seed=5, rank=9).write(folder / "too-large")
    shapes = {name: (outs + 1, ins) for name, (outs, ins) in linear_shapes().items()}
    random_adapter(shapes, rank=4, alpha=8, generator=torch.Generator()).write(folder / "of-another-base")
    return folder


@pytest.fixture(scope="module")
def m(tmp_path_factory, make_bank, key_router):
    """A model of its own, with room for one adapter more."""
    bank = make_bank(tmp_path_factory.mktemp("served"), router=key_router())
    return molora.load(bank, device="cpu", dtype="float32", num_extra_slots=1)


@pytest.fixture(scope="module")
def serving(m, listening):
    """A client and the engine behind it."""

    @contextmanager
    def serve(**settings):
        engine_config = EngineConfig(**{"kv_cache_bytes": 1 << 24, **settings.pop("engine", {})})
        engine = Engine(m, engine_config)
        app = create_app(engine, ServeConfig(bank=str(m.bank.path), engine=engine_config, **settings))
        try:
            with (
                listening(app) as url,
                openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            ):
                yield client, engine
        finally:
            engine.close()

    return serve


@pytest.fixture(scope="module")
def served(serving, folder):
    with serving(adapter_folders=(str(folder),), limits=Limits(max_adapter_rank=8)) as both:
        yield both


@pytest.fixture
def client(served):
    return served[0]


@pytest.fixture
def engine(served):
    return served[1]


@pytest.fixture
def base(m):
    return m.bank.config.base.name


def wait_until_idle(engine, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while (stats := engine.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.01)
    assert stats.num_free_blocks == stats.num_blocks


def greedy(m, prompt, route, start, num_new):
    """By full forwards, without a cache."""
    ids = list(prompt)
    for _ in range(num_new):
        logits, _ = m.logits([ids], [start], route=route)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompt_of(m):
    return m.render(MESSAGES)


@pytest.mark.parametrize("model", ["base", "tiny", "tiny:x", "tiny:y"])
def test_answers_are_the_models_own(m, client, base, model):
    route = {"base": "base", "tiny": "auto"}.get(model, model[-1])
    answer = client.chat.completions.create(
        model=base if model == "base" else model, messages=MESSAGES, max_tokens=12, extra_body={"ignore_eos": True}
    )
    prompt = prompt_of(m)
    ids = greedy(m, prompt.token_ids, route, prompt.starts["turn"], 12)
    assert answer.choices[0].message.content == m.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.usage.completion_tokens == 12
    assert answer.model_extra["molora"]["num_recomputed_tokens"] == 0


def test_a_stream_is_the_answer_piece_by_piece(client):
    extra = {"ignore_eos": True, "return_routes": True}
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "extra_body": extra}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert [chunk.model_extra["molora"]["route"] for chunk in chunks[1:]] == whole.model_extra["molora"]["routes"]
    assert last.usage.completion_tokens == 20


def test_several_choices(client):
    options = {"model": "tiny:x", "messages": MESSAGES, "max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 1}
    answer = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in answer.choices]
    assert texts[0] != texts[1]
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == texts
    assert answer.usage.completion_tokens == sum(answer.model_extra["molora"]["num_generated_tokens"])


def test_routes_and_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=10,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_routes": True},
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    routes = [entry.model_extra["route"] for entry in entries]
    assert [route["adapters"] for route in routes] == answer.model_extra["molora"]["routes"]
    assert all(len(route["candidates"]) == 2 for route in routes)


def test_a_prompt_is_scored(m, client, base, random_ids):
    ids = random_ids(40)
    answer = client.completions.create(model=base, prompt=ids, echo=True, logprobs=1, max_tokens=1)
    logits, _ = m.logits([ids], [len(ids)], route="base")
    expected = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
    assert len(scores.tokens) == len(ids) + 1
    best = logits[0, :-1].argmax(-1).tolist()
    for next_id, best_id, own, top in zip(
        ids[1:], best, scores.token_logprobs[1:-1], scores.top_logprobs[1:-1], strict=True
    ):
        assert (own == max(top.values())) == (next_id == best_id)
        assert len(top) == 1 + (next_id != best_id)


def test_a_second_turn_finds_the_first(m, client, base, engine):
    messages = [{"role": "user", "content": "a long story. " * 8}]
    first = client.chat.completions.create(model=base, messages=messages, max_tokens=4)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *MESSAGES]
    for model in ("tiny", "tiny:x", base):
        second = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens
    assert engine.stats().num_recomputed_tokens == 0


def test_text_is_answered_by_adapters_from_its_first_token_on(m, client, random_ids):
    ids = random_ids(20)
    answer = client.completions.create(model="tiny:x", prompt=ids, max_tokens=8, extra_body={"ignore_eos": True})
    expected = greedy(m, ids, "x", 0, 8)
    assert answer.choices[0].text == m.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_client_that_leaves_a_stream(client, engine):
    with client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **ENDLESS) as stream:
        next(iter(stream))
        assert engine.stats().num_running == 1
    wait_until_idle(engine)
    assert engine.stats().num_generated_tokens < 5000


def test_a_client_that_leaves_a_whole_answer(client, engine):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=MESSAGES, **ENDLESS)
    wait_until_idle(engine)


def test_a_full_engine_refuses_and_those_that_wait_may_leave(serving):
    with serving(engine={"max_sequences": 1, "max_waiting": 1}) as (client, engine), ExitStack() as stack:

        def start():
            return stack.enter_context(
                client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **ENDLESS)
            )

        next(iter(start()))
        left = threading.Event()

        def wait_and_leave():
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=1).chat.completions.create(model="tiny", messages=MESSAGES, **ENDLESS)
            left.set()

        waiting = threading.Thread(target=wait_and_leave)
        waiting.start()
        while not engine.stats().num_waiting:
            time.sleep(0.001)
        with pytest.raises(openai.RateLimitError) as caught:
            start()
        assert int(caught.value.response.headers["retry-after"]) >= 1
        waiting.join()
        assert left.is_set()
        deadline = time.monotonic() + 10
        while engine.stats().num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().num_waiting == 0
        stack.close()
        wait_until_idle(engine)


def load(client, name, path, **fields):
    return client.post(
        "/load_lora_adapter", body={"lora_name": name, "lora_path": path, **fields}, cast_to=httpx.Response
    )


def test_adapters_come_and_go(m, client, folder):
    def answer():
        return client.chat.completions.create(model="tiny:z", messages=MESSAGES, **options).choices[0].message.content

    options = {"max_tokens": 8, "extra_body": {"ignore_eos": True, "activation": "turn"}}
    with pytest.raises(openai.NotFoundError):
        answer()
    assert load(client, "z", "z").status_code == 200
    first = answer()
    assert client.models.retrieve("tiny:z").model_extra["root"] == str(folder.resolve() / "z")
    with pytest.raises(openai.BadRequestError, match="load_inplace"):
        load(client, "z", "other-z")
    load(client, "z", "other-z", load_inplace=True)
    assert answer() != first  # and not what the cache holds of the first
    load(client, "z", "z", load_inplace=True)
    assert answer() == first
    for path, error in (
        ("too-large", openai.BadRequestError),
        ("of-another-base", openai.BadRequestError),
        ("nowhere", openai.NotFoundError),
        ("..", openai.BadRequestError),
        (str(folder.parent), openai.PermissionDeniedError),
    ):
        with pytest.raises(error) as caught:
            load(client, "w", path)
        assert caught.value.param == "lora_path"
    with pytest.raises(openai.BadRequestError, match="router"):
        client.post("/unload_lora_adapter", body={"lora_name": "x"}, cast_to=httpx.Response)
    client.post("/unload_lora_adapter", body={"lora_name": "z"}, cast_to=httpx.Response)
    with pytest.raises(openai.NotFoundError):
        answer()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 50_000}]}, "messages"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"logit_bias": {"999999": 1.0}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [999999]}}, "stop_token_ids"),
        ({"extra_body": {"route": "nobody"}}, "route"),
        ({"extra_body": {"route": {}}}, "route"),
        ({"extra_body": {"route": {"x": 1e300}}}, "route"),
        ({"extra_body": {"activation": "invocation"}}, "activation"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "activation"),
    ],
)
def test_what_only_the_engine_can_refuse(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny:x", "messages": MESSAGES, **fields})
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["", [999999], "x" * 50_000])
def test_a_prompt_that_only_the_engine_can_refuse(client, base, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=base, prompt=prompt)
    assert caught.value.param == "prompt"


def test_metrics_of_real_requests(client, engine, base):
    wait_until_idle(engine)
    client.chat.completions.create(model=base, messages=MESSAGES, max_tokens=3, extra_body={"ignore_eos": True})
    text = client.get("../metrics", cast_to=str)
    assert 'molora:recomputed_tokens_total{model_name="tiny"} 0.0' in text
    assert 'molora:num_requests_running{model_name="tiny"} 0.0' in text
    assert f'molora:generation_tokens_total{{model_name="tiny"}} {engine.stats().num_generated_tokens:.1f}' in text
    assert 'molora:adapter_tokens_total{adapter="base",model_name="tiny"}' in text
