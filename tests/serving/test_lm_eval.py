"""lm-evaluation-harness on a tiny random bank: the registered model and HTTP give the same figures, and the right ones.

Everything is local: tasks, data, the base and the server.
"""

import json
import pickle
from copy import deepcopy

import pytest
import torch

import molora
from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine, EngineConfig

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from molora.lm_eval import Conversation, MoLoRALM  # noqa: E402

MAX_LENGTH = 100
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
""",
    "go_on": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["e", "\\n", "ÿ"]
  max_gen_toks: 12
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}
DOCS = [
    {"question": "What is 2 plus 2?", "choices": ["four", "five", "à peu près"], "answer": 0},
    {"question": "Où est Ulm?", "choices": ["on the Danube", "on the Rhine"], "answer": 0},
    {"question": "Which river runs through Vienna?", "choices": ["the Danube", "the Elbe", "the Po"], "answer": 0},
]
LONG = {"question": "A river runs to the sea. " * 9, "choices": ["It does.", "It does not."], "answer": 0}


@pytest.fixture(scope="module")
def bank(tmp_path_factory, make_bank, key_router):
    return make_bank(tmp_path_factory.mktemp("evaluated"), router=key_router())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        docs = DOCS if name == "go_on" else [*DOCS, LONG]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def evaluate(tasks):
    """Each task's metrics and answers, by any of the harness's models."""

    def evaluate(model, args, names=tuple(TASKS), **options):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("add_env_info", "get_git_commit_hash"):  # they ask git and pip, for a second
                patch.setattr(f"lm_eval.evaluator.{name}", lambda *_: None)
            out = simple_evaluate(
                model, {"max_length": MAX_LENGTH, **args}, list(names), task_manager=tasks, bootstrap_iters=0, **options
            )
        figures = {
            (name, metric): value
            for name, row in out["results"].items()
            for metric, value in row.items()
            if isinstance(value, float)
        }
        assert {name for name, _ in figures} == set(names)
        answers = {name: [sample["resps"] for sample in out["samples"][name]] for name in names}
        return figures, answers

    return evaluate


@pytest.fixture(scope="module")
def served(bank, listening):
    """Where the server listens."""
    m = molora.load(bank, device="cpu", dtype="float32")
    engine = Engine(m, config := EngineConfig(kv_cache_bytes=1 << 24))
    app = create_app(engine, ServeConfig(bank=str(bank.path), engine=config))
    try:
        with listening(app) as url:
            yield f"{url}/v1"
    finally:
        engine.close()


@pytest.fixture(scope="module")
def over_http(bank, served):
    """The arguments of the harness's HTTP models for a route."""

    def of(route, path="completions", **more):
        model = {"base": bank.config.base.name, "auto": "tiny"}.get(route, f"tiny:{route}")
        return {"model": model, "base_url": f"{served}/{path}", "max_retries": 1, **more}

    return of


@pytest.fixture(scope="module")
def here(bank):
    """The arguments of the registered model for a route."""

    def of(route, **more):
        return {"bank": str(bank.path), "device": "cpu", "dtype": "float32", "route": route, **more}

    return of


@pytest.fixture(scope="module")
def with_tokenizer(bank):
    return {"tokenizer": bank.config.base.name}


@pytest.fixture(scope="module")
def lm(bank):
    return MoLoRALM(bank.path, device="cpu", dtype="float32", max_length=MAX_LENGTH)


def numbers(answers):
    """Log-probabilities and whether they are greedy, one after the other; texts are left out."""
    if isinstance(answers, (list, tuple)):
        return [number for each in answers for number in numbers(each)]
    return [] if isinstance(answers, str) else [float(answers)]


def assert_alike(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[1].get("go_on") == second[1].get("go_on")
    assert first[1].keys() == second[1].keys()
    assert numbers(list(first[1].values())) == pytest.approx(numbers(list(second[1].values())), abs=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("route", ["base", "x", "auto"])
def test_here_and_over_http(evaluate, here, over_http, with_tokenizer, route):
    mine = evaluate("molora", here(route, batch_size=2))
    assert_alike(mine, evaluate("local-completions", over_http(route, **with_tokenizer, batch_size=4)))
    if route != "auto":
        peft = {} if route == "base" else {"peft": f"{here(route)['bank']}/adapters/{route}"}
        # It runs neither the last token nor one that nobody asked for.
        reference = {"pretrained": over_http("base")["model"], "max_length": MAX_LENGTH - 2, "dtype": "float32", **peft}
        assert_alike(mine, evaluate("hf", reference, device="cpu"))


@pytest.mark.parametrize("route", ["x", "auto"])
def test_conversations_here_and_over_http(evaluate, here, over_http, with_tokenizer, route):
    """An answer begins at the last user message, as in use; text of the same tokens has no messages."""
    chat = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 0}
    mine, from_the_start = (
        evaluate("molora", here(route, max_length=200, **more), ["go_on"], **chat) for more in ({}, {"activation": 0})
    )
    args = over_http(route, "chat/completions", max_length=200)
    assert_alike(mine, evaluate("local-chat-completions", args, ["go_on"], **chat))
    assert mine[1] != from_the_start[1]

    args = over_http(route, **with_tokenizer, max_length=200)
    mine = evaluate("molora", here(route, max_length=200, activation=0), ["choose", "go_on"], **chat)
    assert_alike(mine, evaluate("local-completions", args, ["choose", "go_on"], **chat))


def test_draws_here_and_over_http(evaluate, here, over_http, with_tokenizer):
    options = {"names": ["go_on"], "gen_kwargs": {"do_sample": True, "temperature": 1.5, "top_p": 0.9}}
    mine = evaluate("molora", here("auto"), **options)
    assert_alike(mine, evaluate("local-completions", over_http("auto", **with_tokenizer), **options))
    assert mine[1] != evaluate("molora", here("auto", seed=5), **options)[1]


def ask(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def log_likelihood(m, ids, num_scored, start, route):
    logits, _ = m.logits([ids], [start], route=route)
    logprobs = logits[0, :-1].log_softmax(-1)
    first = len(ids) - num_scored - 1
    own = logprobs[first:].gather(-1, torch.tensor(ids[first + 1 :])[:, None])[:, 0]
    return float(own.sum()), bool((own == logprobs[first:].max(-1).values).all())


def test_activation_of_text(bank):
    """An index counts the tokens that are read, and the context and its continuation are read at once."""
    for route, activation, start in (
        ("x", None, 0),
        ({"x": 0.5, "y": 0.25}, None, 0),
        ("x=0.5,y=0.25", 0, 0),
        ("auto", "system", 0),
        ("auto", "7", 7),
        ("x", 7, 7),
        ("x", 15, 15),
    ):
        lm = MoLoRALM(bank.path, device="cpu", route=route, activation=activation)
        ids = lm.tok_encode("What is 2+2? It is 4")
        (score,) = lm.loglikelihood([ask("loglikelihood", "What is 2+2? ", "It is 4")], disable_tqdm=True)
        assert score == pytest.approx(log_likelihood(lm.m, ids, 8, start, lm.route), abs=1e-4)


def test_activation_of_a_conversation(bank):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hé"}]
    for route, activation in (("x", None), ("auto", "response"), ("auto", "system"), ("x", 9)):
        lm = MoLoRALM(bank.path, device="cpu", route=route, activation=activation)
        text = lm.apply_chat_template(messages)
        begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "It"}], add_generation_prompt=False)
        assert begun == f"{text}It"
        start = lm.m.activation_start(lm.m.render(messages), route, activation)
        assert start > 0
        for context, num_scored in ((text, 4), (begun, 3)):  # a space at its end counts as the continuation's
            ids = lm.tok_encode(context + " is", add_special_tokens=False)
            (score,) = lm.loglikelihood([ask("loglikelihood", context, " is")], disable_tqdm=True)
            assert score == pytest.approx(log_likelihood(lm.m, ids, num_scored, start, route), abs=1e-4)
        (answer,) = lm.generate_until([ask("generate_until", text, {"max_gen_toks": 5})], disable_tqdm=True)
        assert answer == lm.m.generate(messages, route=route, activation=activation, max_new_tokens=5).text


def test_a_conversation_whose_beginning_is_cut(bank):
    lm = MoLoRALM(bank.path, device="cpu", route="x", max_length=60)
    messages = [{"role": "system", "content": "a long story " * 5}, {"role": "user", "content": "Sum it up"}]
    text = lm.apply_chat_template(messages)
    ids = lm.tok_encode(text + "Yes", add_special_tokens=False)
    (score,) = lm.loglikelihood([ask("loglikelihood", text, "Yes")], disable_tqdm=True)
    start = text.starts["turn"] - (len(ids) - 59)
    assert start > 0
    assert score == pytest.approx(log_likelihood(lm.m, ids[-59:], 4, start, "x"), abs=1e-4)


def test_a_conversation_keeps_its_starts_in_the_harness_caches(lm):
    text = lm.apply_chat_template([{"role": "user", "content": "a"}])
    assert isinstance(text, str)
    assert text.starts["turn"] > text.starts["system"] == 0
    for copy in (deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert isinstance(copy, Conversation)
        assert (copy, copy.starts) == (text, text.starts)
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert lm.tokenizer_name


def test_greedy_continuations(lm):
    ids = lm.tok_encode("Ulm is")
    logits, _ = lm.m.logits([ids], [0])
    *_, second, best = logits[0, -1].argsort().tolist()
    requests = [(None, ids, scored) for scored in ([best], [second], [])]
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in scores] == [True, False, True]
    assert scores[2][0] == 0


def test_special_tokens_that_the_tokenizer_adds(bank, tmp_path):
    """Texts begin with them, conversations have their template's."""
    lm = MoLoRALM(bank.path, device="cpu")

    class Adding:
        def __getattr__(self, name):
            return getattr(lm.m.tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **options):
            ids = lm.m.tokenizer(text, **options)
            return {**ids, "input_ids": [self.bos_token_id] * add_special_tokens + ids["input_ids"]}

    lm.tokenizer = Adding()
    plain = lm.m.tokenizer("ab")["input_ids"]
    assert lm.tok_encode("ab") == [1, *plain]
    assert lm.tok_encode("<|im_start|>ab") == [1, *plain]
    assert lm._encode_pair("a ", "b") == ([1, plain[0]], lm.m.tokenizer(" b")["input_ids"])
    text = Conversation("a")
    assert lm._encode_pair(text, "b") == (plain[:1], plain[1:])
    lm.add_bos_token = False
    assert lm.tok_encode("ab") == plain


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"route": "z"}, "has no adapter 'z'"),
        ({"route": "x=a"}, "'x=a' is no NAME=WEIGHT"),
        ({"activation": "never"}, "activation 'never' is unknown"),
        ({"activation": -1}, "activation -1 is unknown"),
        ({"max_length": 2}, "max_length is 2; expected 3 to 1024 tokens"),
        ({"max_length": 1025}, "max_length is 1025; expected 3 to 1024 tokens"),
        ({"batch_size": 0}, "max_sequences is 0"),
        ({"foo": 1, "a": 2}, "unknown arguments of the model: a, foo"),
    ],
)
def test_wrong_arguments(bank, args, message):
    with pytest.raises(ValueError, match=message):
        MoLoRALM(bank.path, device="cpu", **args)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("generate_until", ("a", {"num_beams": 4}), r"unknown options \['num_beams'\]"),
        ("generate_until", ("a", {"max_gen_toks": 99}), "asks for 99 tokens, which leaves no room"),
        ("generate_until", ("a", {"until": [""]}), "stop has an empty string"),
        ("loglikelihood", ("a", "b" * 99), "a continuation has 99 tokens; with max_length=100 it may have 98"),
    ],
)
def test_requests_that_cannot_be_served(lm, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(lm, kind)([ask(kind, *arguments)], disable_tqdm=True)


def test_an_invocation_that_does_not_occur(lm, monkeypatch):
    monkeypatch.setattr(lm, "activation", "invocation")
    monkeypatch.setattr(lm, "route", "x")
    with pytest.raises(ValueError, match="adapter 'x' has no alora_invocation_tokens"):
        lm.loglikelihood([ask("loglikelihood", "a", "b")], disable_tqdm=True)
