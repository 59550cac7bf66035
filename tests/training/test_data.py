"""Packed batches: nothing leaks between conversations, and batch i is the same after a resume."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.checkpoint import load_base
from molora.tiny import byte_tokenizer, make_tiny_base
from molora.training.batches import NEVER, OTHER, ActivationMix, PackedLoader
from molora.training.data import ChatData
from molora.training.examples import IGNORE, Encoder, Example, encode

TOKENIZER = byte_tokenizer()
MIX = ActivationMix()


def example(text: str, domain: str | None = "x") -> Example:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
    return encode({"messages": messages, "domain": domain}, TOKENIZER)


DATA = [example(f"word {i}" * (1 + i % 3), "x" if i % 2 else "y") for i in range(11)]


def loader(mix: ActivationMix = MIX, **changes: Any) -> PackedLoader:
    arguments = {"row_length": 512, "rows": 2, "pad_id": 0, "mix": mix, "seed": 3, **changes}
    return PackedLoader(DATA, ["x"], **arguments)


def test_an_epoch_serves_every_conversation_once() -> None:
    served = loader(rows=1)
    rows = list(islice(served, len(served.packed)))
    firsts = sum(int((batch.position_ids == 0).sum()) for batch in rows)
    pads = sum(int((batch.start == NEVER).any()) for batch in rows)
    assert firsts - pads == len(DATA)


def test_the_second_epoch_is_the_same_rows_in_another_order() -> None:
    served = loader(rows=1)
    numbers = [int(batch.rows[0]) for batch in islice(served, 2 * len(served.packed))]
    first, second = numbers[: len(served.packed)], numbers[len(served.packed) :]
    assert sorted(first) == sorted(second) == list(range(len(served.packed)))


def test_a_resumed_loader_serves_what_an_uninterrupted_one_would_have() -> None:
    whole = list(islice(loader(), 9))
    after = loader(first_batch=lambda: 4)
    for ours, theirs in zip(islice(after, 5), whole[4:], strict=True):
        for name, value in vars(ours).items():
            assert torch.equal(value, getattr(theirs, name)), name


def test_ranks_share_the_rows() -> None:
    one = [int(row) for batch in islice(loader(rows=1), 6) for row in batch.rows]
    two = [
        [int(row) for batch in islice(loader(rows=1, rank=r, world_size=2), 3) for row in batch.rows] for r in (0, 1)
    ]
    assert one == [row for pair in zip(*two, strict=True) for row in pair]


def test_targets_are_the_next_learned_ids() -> None:
    batch = next(iter(loader()))
    learned = batch.targets != IGNORE
    assert learned.any()
    following = batch.input_ids.roll(-1, dims=1)
    assert torch.equal(batch.targets[learned], following[learned])
    assert bool((batch.position_ids.roll(-1, dims=1)[learned] > 0).all())  # never across a conversation's end


def test_domains_are_indices_and_others_are_told_apart_from_unknown() -> None:
    batch = next(iter(loader()))
    assert set(batch.domains.unique().tolist()) == {0, OTHER, IGNORE}


@pytest.mark.parametrize(
    ("mix", "where"), [(ActivationMix(1, 0, 0), "turn"), (ActivationMix(0, 1, 0), "response")], ids=["turn", "response"]
)
def test_activation_points_are_where_the_mix_says(mix: ActivationMix, where: str) -> None:
    wanted = {getattr(each, where) for each in DATA}
    batch = next(iter(loader(mix)))
    assert set(batch.start[batch.start != NEVER].tolist()) <= wanted


def test_activation_points_vary_between_epochs() -> None:
    served = loader(ActivationMix(0, 0, 1), rows=1)
    batches = list(islice(served, 2 * len(served.packed)))
    number = int(batches[0].rows[0])
    first, second = (batch for batch in batches if int(batch.rows[0]) == number)
    assert torch.equal(first.input_ids, second.input_ids)
    assert not torch.equal(first.start, second.start)


def test_an_adapter_rests_where_the_mix_says() -> None:
    def rest(**shares: float) -> torch.Tensor:
        return next(iter(loader(ActivationMix(**shares)))).rest

    batch = next(iter(loader()))
    foreign = batch.domains == OTHER
    ends = {len(each.token_ids): each for each in DATA}
    assert not rest(others_rest=0, strays=0).any()
    assert torch.equal(rest(others_rest=1, strays=0), foreign)
    strays = rest(others_rest=0, strays=1)
    assert 0.01 < strays.float().mean() < 0.5
    for row, column in strays.nonzero().tolist():  # only between the turn's start and the response
        begin = column - int(batch.position_ids[row, column])
        following = (batch.position_ids[row, begin + 1 :] == 0).nonzero()
        length = int(following[0]) + 1 if len(following) else batch.input_ids.shape[1] - begin
        assert ends[length].turn <= column - begin < ends[length].response


def test_strangers_write_the_parts_of_others_and_the_questions_beginning() -> None:
    batch = next(iter(loader(ActivationMix(strangers=1, others_rest=1))))
    foreign, signs = batch.domains == OTHER, batch.signs
    assert not batch.rest.any()
    assert not next(iter(loader(ActivationMix(others_rest=1)))).signs.any()
    assert (signs[foreign] != 0).all()
    ends = {len(each.token_ids): each for each in DATA}
    num_begun = 0
    for row, positions in enumerate(batch.position_ids):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for begin, end in pairwise(begins):
            example = ends.get(end - begin)
            if example is None:
                continue
            own = (signs[row, begin:end] != 0) & ~foreign[row, begin:end]
            assert not own[: example.turn].any()
            assert not own[example.response :].any()
            written = signs[row, begin:end][own]
            num_begun += bool(own.any())
            assert len(written.unique()) <= 1
            assert own[example.turn] == own.any() or foreign[row, begin + example.turn]
    assert num_begun > 3


def test_shares_are_shares() -> None:
    for shares in ({"strays": 1.5}, {"others_rest": -0.1}, {"strangers": 2}, {"turn": float("nan")}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ActivationMix(**shares)


def test_shares_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        ActivationMix(turn=0.5, response=0.2, between=0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_packed_conversations_do_not_see_each_other(architecture: str, tmp_path: Path) -> None:
    model, _ = load_base(make_tiny_base(tmp_path / "base", seed=0, architecture=architecture), device="cpu")
    batch = next(iter(loader(rows=1)))
    with torch.inference_mode():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
        assert len(starts) > 3
        for begin, end in pairwise(starts):
            alone = model(input_ids=batch.input_ids[:, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-4)


def test_bases_tasks_are_groups_of_their_own() -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    records = [
        {"messages": messages, "domain": None, "task": "zebras"},
        {"messages": messages, "domain": None, "task": "apes"},
        {"messages": messages, "domain": None},
        {"messages": messages, "domain": "x", "task": "apes"},
        {"messages": messages, "domain": "y"},
    ]
    data = [encode(record, TOKENIZER) for record in records]
    served = PackedLoader(data, ["base", "x"], row_length=512, rows=1, pad_id=0, mix=MIX, seed=0)
    found = {}
    for batch in islice(served, len(served.packed)):
        for domain, group in zip(batch.domains.flatten().tolist(), batch.groups.flatten().tolist(), strict=True):
            found.setdefault(domain, set()).add(group)
    assert found == {0: {0, 2, 3}, 1: {1}, OTHER: {OTHER}, IGNORE: {IGNORE}}
    assert encode({"messages": messages, "task": 3}, TOKENIZER).task is None  # another table's column


def lessons(examples: Sequence[Example], domain: str) -> Counter[tuple[tuple[int, ...], int]]:
    """What an adapter learns to write, and behind what."""
    return Counter(
        (each.token_ids[: index + 1], each.token_ids[index + 1])
        for each in examples
        for index in range(len(each.token_ids) - 1)
        if each.learned[index + 1] and each.domains[index] in (domain, None)
    )


def test_adapters_that_learn_apart_read_no_more_than_they_need(tmp_path: Path) -> None:
    def parts(*domains: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": f"{domain} does this. ", "domain": domain} for domain in domains]

    def record(*domains: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": role, "content": parts(*domains)} for role in ("user", "assistant")]
        return {"messages": messages, "domain": list(domains), **more}

    plain = {"prompt": "who", "completion": "nobody knows"}
    records = [record("x", "y"), record("y", "x"), record("y"), record("x", "y", "x"), record("x", labels_only=True)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [*records, plain]))
    encoded = [encode(each, TOKENIZER) for each in [*records, plain]]
    data, encoder = ChatData(str(file)), Encoder(TOKENIZER, max_length=1024)
    data.prepare(TOKENIZER, ["x", "y"], apart=True)
    for domain, num_left in (("x", 4), ("y", 5)):
        with pytest.warns(UserWarning, match="records have other domains than"):
            own = data._examples("train", (domain,), encoder)
        assert len(own) == num_left
        assert lessons(own, domain) == lessons(encoded, domain)
        assert all(each.learned[-1] and each.domains[-2] in (domain, None) for each in own)
    data.prepare(TOKENIZER, ["x", "y"])
    assert data._examples("train", ("x", "y"), encoder) == encoded
