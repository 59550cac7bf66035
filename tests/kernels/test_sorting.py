"""The launches that sort tokens for the fused regime; the GEMM behind them needs a Hopper GPU."""

from collections.abc import Callable

import pytest
import torch
from molora_kernels import backend

sorting = pytest.importorskip("molora_kernels.sorting")


@pytest.mark.parametrize("routes", ["uniform", "zipf", "identical", "none"])
@pytest.mark.parametrize(("num_tokens", "rank", "num_siblings"), [(1, 64, 1), (150, 24, 2), (300, 64, 1)])
def test_h_lies_under_the_columns_of_each_tokens_adapter(
    make_problem: Callable, device: torch.device, routes: str, num_tokens: int, rank: int, num_siblings: int
) -> None:
    if not backend.triton_runs_on(device) or (device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("needs Triton's interpreter, or a GPU whose launches overlap")
    dtype = torch.float16
    problem = make_problem(
        num_tokens, 136, 64, 7, rank, 1, num_siblings=num_siblings, dtype=dtype, routes=routes, integers=True
    )
    plan, x = problem.plan, problem.x
    a_GERI = problem.lora_a.view(num_siblings, 7, rank, 136)
    scaling_EG = problem.scaling.view(7, num_siblings)
    tables = plan.tables
    sorted_x, spans, partials = sorting.sort_and_shrink(x, a_GERI, plan.ids, tables.order, tables.offsets)
    h = torch.full((num_tokens, num_siblings * 7 * rank), 99.0, dtype=dtype, device=device)
    sorting.spread_(h, partials, scaling_EG, problem.gates, plan.ids, tables.order, spans)

    order = tables.order.long()
    assert torch.equal(sorted_x, x[order])
    ids = plan.ids[order, 0]
    for place, adapter in enumerate(ids.tolist()):
        block = ids[place // 128 * 128 : place // 128 * 128 + 128]
        present = block[block >= 0].tolist()
        expected_span = [min(present, default=7), max(present, default=-1)]
        assert spans[place // 128].tolist() == expected_span
        lowest, highest = expected_span
        if highest < 0:
            continue
        first, end = lowest * rank // 64 * 64, min(-(-(highest + 1) * rank // 64) * 64, 7 * rank)
        for g in range(num_siblings):
            row = h[place].view(num_siblings, 7 * rank)[g]
            expected = torch.zeros(7 * rank, device=device)
            if adapter >= 0:
                u = a_GERI[g, adapter].float() @ x[order[place]].float()
                gate = problem.gates[order[place], 0] * scaling_EG[adapter, g]
                expected[adapter * rank : (adapter + 1) * rank] = u * gate
            assert torch.equal(row[first:end].float(), expected[first:end])
