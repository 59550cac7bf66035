from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from molora_kernels import make_plan


def int32(rows: list[list[int]], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def test_ids_out_of_range_act_as_none(device: torch.device) -> None:
    plan = make_plan(int32([[0, 3], [-7, 2], [-1, 2**31 - 1]], device), 3)
    assert plan.ids.tolist() == [[0, -1], [-1, 2], [-1, -1]]
    assert plan.ids.dtype == torch.int32
    assert plan.num_adapters == 3


def test_ids_are_copied_from_a_strided_matrix() -> None:
    ids = int32([[0, 9, 1], [1, 9, 0]])[:, ::2]
    plan = make_plan(ids, 2)
    assert plan.ids.is_contiguous()
    assert plan.ids.tolist() == [[0, 1], [1, 0]]


def test_plan_is_frozen() -> None:
    plan = make_plan(int32([[0]]), 1)
    with pytest.raises(FrozenInstanceError):
        plan.num_adapters = 2  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [3, -2, 2**31 - 1])
def test_check_names_the_id_out_of_range(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"\[-1, 3\), got {wrong}"):
        make_plan(int32([[0], [wrong]]), 3, check=True)


def test_check_passes_legal_ids() -> None:
    assert make_plan(int32([[-1], [0], [2]]), 3, check=True).ids.tolist() == [[-1], [0], [2]]


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 0, dtype=torch.int32)],
)
def test_ids_of_another_form_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="ids must be an int32 tensor"):
        make_plan(ids, 3)


def test_a_bank_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="num_adapters must be at least 1"):
        make_plan(int32([[0]]), 0)


@given(st.integers(1, 8).flatmap(lambda k: st.lists(st.lists(st.integers(-2, 5), min_size=k, max_size=k), max_size=40)))
def test_order_is_a_stable_sort_with_inactive_tokens_last(rows: list[list[int]]) -> None:
    tables = make_plan(int32(rows).reshape(len(rows), -1) if rows else int32([[0]])[:0], 5).tables
    if tables is None:
        pytest.skip("no Triton here")
    order = tables.order
    smallest = [min((e for e in row if 0 <= e < 5), default=5) for row in rows]
    assert order.tolist() == sorted(range(len(rows)), key=smallest.__getitem__)
    assert order.dtype == torch.int32


def test_tables_are_left_out_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora_kernels.plan.triton_runs_on", lambda device: False)
    assert make_plan(int32([[0]]), 1).tables is None
