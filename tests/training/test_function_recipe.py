"""Data of functions: labels that are right, balanced splits that share nothing, drafts that go on; and the training."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import lightning as L
import pytest
import yaml

import molora
from molora.activation import render
from molora.adapter import Adapter
from molora.generation import Sampling
from molora.serving.engine import Request
from molora.tiny import byte_tokenizer
from molora.training.adapter import AdapterTraining
from molora.training.batches import ActivationMix
from molora.training.data import ChatData
from molora.training.examples import encode, read_records
from molora.training.recipes import answerability as answerability_module
from molora.training.recipes.answerability import answerability, context
from molora.training.recipes.answerability_wordings import FORMS, KINDS, TURNS
from molora.training.recipes.drafts import Drafts, draft
from molora.training.recipes.functions import main, questions
from molora.training.recipes.tasks import DEMO, verify
from molora.training.recipes.verdicts import INVOCATIONS, RELATIONS, balanced, check, corrupted, uncertainty

REPOSITORY = Path(__file__).parents[2]
NUMS = {"train": 40, "val": 10, "heldout": 20, "best": 10}


@pytest.fixture(scope="module")
def asked():
    pytest.importorskip("reasoning_gym")
    return questions(0, NUMS)


def drafts_of(records, *, seed=0):
    """Right and wrong replies by turns, as a bank might have drafted them; every third question has right ones only."""
    rng, found = Random(seed), []
    for number, record in enumerate(records):
        reply = record["messages"][-1]["content"]
        wrong = [corrupted(reply, record["answer"], record["domain"], rng) for _ in range(2)]
        texts = [reply, reply, reply] if number % 3 == 2 else [wrong[0], reply, wrong[1]]
        right = [verify(record["domain"], record["answer"], text) for text in texts]
        found.append(Drafts(texts=texts, right=right, logprobs=[-0.5] * 3))
    return found


def text_of(messages):
    return json.dumps(messages)


@pytest.mark.parametrize("split", ["train", "held out"])
def test_a_context_answers_what_it_tells_and_nothing_else(split):
    records = answerability(200, split, 0)
    assert Counter(record["label"] for record in records) == {"yes": 100, "no": 100}
    assert all(record["is_known"] for record in records if record["label"] == "yes")
    unknown = [record["is_known"] for record in records if record["label"] == "no"]
    assert 25 < sum(unknown) < 75  # the entity is there, and what is asked is told of another one
    found = context(Random(0), split)
    assert len(found.told) == found.text.count(".")
    assert all(name.removeprefix("the ") in found.text for name in found.names)


def test_the_label_is_whether_the_fact_is_there(monkeypatch):
    """Sentences and questions that name what they are about show it."""
    plain = {kind: {name: f"{kind}/{name}" for name in each.attributes} for kind, each in KINDS.items()}

    def pick(choices, split, rng):
        for kind, each in KINDS.items():
            for name, attribute in each.attributes.items():
                if choices is attribute.facts:
                    return f"<{plain[kind][name]} of {{name}}>"
                if choices is attribute.questions:
                    return f"?{plain[kind][name]} of {{name}}?"
        return "{text}{question}" if choices is FORMS else ("{text}", "")

    monkeypatch.setattr(answerability_module, "_pick", pick)
    for record in answerability(100, "train", 1):
        text = "".join(message["content"] for message in record["messages"][:-2])
        question = text.partition("?")[2].rstrip("?")
        assert (f"<{question}>" in text) == (record["label"] == "yes")


def test_splits_share_no_wording_no_name_and_no_record(asked):
    held_out = {
        choices[index]
        for each in KINDS.values()
        for attribute in each.attributes.values()
        for choices in (attribute.facts, attribute.questions)
        for index in choices.indices("held out")
    }
    training = {
        choices[index]
        for each in KINDS.values()
        for attribute in each.attributes.values()
        for choices in (attribute.facts, attribute.questions)
        for index in choices.indices("train")
    }
    assert not held_out & training
    assert all(not {*each.names.training} & {*each.names.held_out} for each in (*KINDS.values(),))
    assert not {*FORMS.training} & {*FORMS.held_out}
    assert not {*TURNS.training} & {*TURNS.held_out}
    splits = ("train", "val", "held out")
    contexts = [{text_of(each["messages"][:-2]) for each in answerability(100, split, 0)} for split in splits]
    tasks = [{text_of(each["messages"][:-1]) for each in records} for records in asked.values()]
    assert all(not one & other for one, other in combinations([*contexts, *tasks], 2))
    assert [len(each) for each in tasks] == [*NUMS.values()]
    assert {name: len(records) for name, records in asked.items()} == NUMS
    wordings = {name: {(each["domain"], each["wording"]) for each in records} for name, records in asked.items()}
    assert not (wordings["heldout"] | wordings["best"]) & (wordings["train"] | wordings["val"])


def test_drafts_become_balanced_records_whose_labels_the_verifier_gives(asked):
    records, drafts = asked["train"], drafts_of(asked["train"])
    for fills in (True, False):
        checks = check(records, drafts, Random(0), fills=fills)
        for domain in DEMO:
            labels = Counter(each["label"] for each in checks if each["about"] == domain)
            assert labels["yes"] == labels["no"] > 0
        by_question = {text_of(record["messages"][:-1]): record for record in records}
        for each in checks:
            *question, answer, invocation, label = each["messages"]
            record = by_question[text_of(question)]
            assert verify(record["domain"], record["answer"], answer["content"]) == (label["content"] == "yes")
            assert invocation == {"role": "user", "content": INVOCATIONS["check"]}
            assert each["domain"] == "check"
        assert ({each["origin"] for each in checks} == {"sampled"}) is not fills
    both = uncertainty(records, drafts, Random(0))
    assert Counter(each["label"] for each in both)["yes"] * 2 == len(both)
    assert all(len(each["messages"]) == 3 for each in both)
    first = uncertainty(records, drafts, Random(0), num_each=1)
    assert 0 < len(first) < len(both)


def test_what_one_domain_lacks_is_left_out():
    made = [{"about": about, "label": label} for about, label in (("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "no"))]
    assert Counter((each["about"], each["label"]) for each in balanced(made, Random(0))) == {
        ("a", "yes"): 1,
        ("a", "no"): 1,
    }


@pytest.mark.parametrize(
    ("domain", "answer", "reply"),
    [
        ("arithmetic", "706", "417 + 385 = 802. 802 - 96 = 706.\nAnswer: 706"),
        ("words", "ward", "d r a w -> w a r d\nAnswer: ward"),
        ("words", "oo", "o o -> o o\nAnswer: oo"),
        ("family", "mother", "Al is a child of Bo.\nAnswer: mother"),
        ("family", "mother-in-law", "Al is married to Bo. Bo is a child of Cy.\nAnswer: mother-in-law"),
        ("sorting", "7, 12, 31", "Answer: 7, 12, 31"),
    ],
)
def test_a_corrupted_reply_is_wrong_and_like_the_right_one(domain, answer, reply):
    assert verify(domain, answer, reply)
    made = {corrupted(reply, answer, domain, Random(seed)) for seed in range(20)}
    assert all(not verify(domain, answer, text) and "Answer: " in text for text in made)
    assert len(made) > 1


def test_what_is_corrupted_stays_of_its_kind():
    for seed in range(20):
        text = corrupted("Al is married to Bo.\nAnswer: mother-in-law", "mother-in-law", "family", Random(seed))
        assert text.rpartition("Answer: ")[2] in RELATIONS
        text = corrupted("16 - 10 = 6.\nAnswer: 6", "6", "arithmetic", Random(seed))
        assert re.match(r"16 - 10 = \d\.\n", text)  # a term that has the answer's digits is none of it


@pytest.fixture(scope="module")
def m(tmp_path_factory, make_bank, make_adapter):
    folder = tmp_path_factory.mktemp("drafting")
    bank = make_bank(folder, adapters={domain: make_adapter(seed=seed) for seed, domain in enumerate(DEMO)})
    return molora.load(bank, device="cpu", dtype="float32")


def test_drafts_go_on_behind_the_last_whole_line(m, asked, tmp_path, monkeypatch):
    settings = {"num_drafts": 2, "temperature": 1.0, "seed": 0, "max_new_tokens": 6}
    with monkeypatch.context() as patched:
        patched.setattr("molora.training.recipes.drafts.AT_ONCE", 6)
        whole = draft(m, asked["val"], tmp_path / "whole.jsonl", **settings)
    assert [len(each["texts"]) for each in whole] == [2] * 10
    assert all(each["texts"][0] != each["texts"][1] for each in whole)
    assert all(logprob < 0 for each in whole for logprob in each["logprobs"])
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(lines[:5]) + lines[5][:9])
    again = draft(m, asked["val"], broken, **settings)
    assert [each["texts"] for each in again] == [each["texts"] for each in whole]
    assert again[:4] == whole[:4]  # not drawn again
    assert [*read_records(broken)][1:] == again
    for limit, num_kept in ((3, 3), (None, 10), (3, 10)):  # what was limited may go on
        some = draft(m, asked["val"], tmp_path / "limited.jsonl", **settings, limit=limit)
        assert [each["texts"] for each in some] == [each["texts"] for each in whole[:limit]]
        assert len([*read_records(tmp_path / "limited.jsonl")]) == 1 + num_kept
    with pytest.raises(ValueError, match="drafts of other questions"):
        draft(m, asked["val"], broken, **{**settings, "temperature": 0.5})


def test_the_command_writes_what_needs_no_model_and_then_the_rest(m, tmp_path, capsys, monkeypatch):
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "data"
    options = ["--out", str(out), "--num-train", "30", "--num-heldout", "15", "--num-best", "5"]
    with pytest.raises(SystemExit):
        main([*options, "--num-best", "0"])
    assert "expected 1 or more of each kind" in capsys.readouterr().err
    assert not out.exists()
    main(options)
    assert "30" in capsys.readouterr().out
    written = {file.name for file in out.iterdir()}
    assert "questions_heldout.jsonl" in written
    assert not any("check" in name for name in written)
    before = (out / "questions_train.jsonl").stat().st_mtime_ns
    with pytest.raises(SystemExit):  # of a random model, nothing is right
        main([*options, "--bank", str(m.bank.path), "--limit", "15"])
    assert "has nothing to tell apart" in capsys.readouterr().err
    assert (out / "questions_train.jsonl").stat().st_mtime_ns == before
    for name in NUMS:
        records = [*read_records(out / f"questions_{name}.jsonl")]
        lines = [json.dumps(each) for each in drafts_of(records[:15])]
        file = out / f"drafts_{name}.jsonl"
        file.write_text("\n".join([file.read_text().splitlines()[0] if file.is_file() else "{}", *lines]) + "\n")
    monkeypatch.setattr("molora.training.recipes.drafts._done", lambda out, head: [*read_records(out)][1:])
    main([*options, "--bank", str(m.bank.path), "--limit", "15"])
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["files"]["train_check.jsonl"]["num_records"] == 30
    assert {each["label"] for each in read_records(out / "heldout_uncertainty.jsonl")} <= {"yes", "no"}


@pytest.mark.filterwarnings("default")  # Lightning warns of its own deprecations
def test_functions_are_trained_side_by_side_and_answer_behind_their_invocations(tmp_path, base_dir, make_bank):
    names = ("answerability", "check")
    for name in names:
        records = answerability(40, "train", 0)
        lines = [json.dumps({**record, "domain": name}) for record in records]
        for record, line in zip(records, lines, strict=True):
            example = encode(json.loads(line), byte_tokenizer())
            prompt = render(byte_tokenizer(), record["messages"][:-1])
            assert example.turn == prompt.starts["turn"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    base = str(base_dir())
    training = AdapterTraining(
        [*names],
        str(tmp_path / "adapters"),
        base,
        rank=4,
        router_layer=1,
        invocation={**INVOCATIONS, "answerability": "Said?"},
    )
    data = ChatData(
        {name: str(tmp_path / f"{name}.jsonl") for name in names},
        row_length=1024,
        rows=1,
        activation=ActivationMix(turn=1.0, first=0, before=0, between=0, response=0),
    )
    L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
        training, data
    )
    tokenizer = byte_tokenizer()
    for name, text in (("answerability", "Said?"), ("check", INVOCATIONS["check"])):
        ids = Adapter.read(tmp_path / "adapters" / name).config.alora_invocation_tokens
        assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n"
    bank = make_bank(tmp_path, adapters={})
    bank.add(tmp_path / "adapters" / "answerability")
    assert bank["answerability"].activation == "invocation"
    m = molora.load(bank, device="cpu", dtype="float32")
    messages = [{"role": "user", "content": "Where?"}, {"role": "user", "content": "Said?"}]
    request = Request(prompt=messages, route="answerability", sampling=Sampling(max_new_tokens=1))
    (out,) = m.engine.generate([request])
    assert out.activation_start == m.render(messages).starts["turn"]
    with pytest.raises(ValueError, match="do not occur"):
        m.generate(messages[:1], route="answerability")


def test_every_function_needs_an_invocation():
    with pytest.raises(ValueError, match="invocation is given for 'check'; add one for 'guard'"):
        AdapterTraining(["check", "guard"], invocation={"check": "Right?"})


def test_the_records_of_the_docs_are_what_training_reads():
    text = (REPOSITORY / "docs" / "functions.md").read_text()
    records = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]
    assert {record["domain"] for record in records} == {"guard", "grounded", "rewrite"}
    for record in records:
        example = encode(record, byte_tokenizer())
        assert set(example.domains[example.turn + 20 :]) == {record["domain"]}
        invocation = record["messages"][-2]["content"]
        assert byte_tokenizer().decode(example.token_ids[example.turn : example.response]).count(invocation) == 1
    config = yaml.safe_load((REPOSITORY / "configs" / "functions.yaml").read_text())
    assert config["model"]["init_args"]["invocation"] == INVOCATIONS
    assert all(f"`{name}`" in text for name in INVOCATIONS)
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert (REPOSITORY / "docs" / name).is_file()
    own = yaml.safe_load(*re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL))
    assert AdapterTraining(**own["model"]["init_args"]).invocation == records[0]["messages"][-2]["content"]
    assert ActivationMix(**own["data"]["activation"]) == ActivationMix(**config["data"]["activation"])
