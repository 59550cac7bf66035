"""Steps on static buffers, padded to a bucket, with Triton's attention: captured on a GPU, run as they are on a CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import molora
from molora import MoLoRA, RouterConfig, Sampling
from molora.generation import Grammar
from molora.serving import captured as captured_module
from molora.serving import engine as engine_module
from molora.serving import runner as runner_module
from molora.serving.captured import BUCKETS, Buffers, Capacity
from molora.serving.compiled import compile_layers
from molora.serving.engine import Engine, EngineConfig
from molora.serving.packing import Row, pack
from molora.serving.request import EngineError, Request
from molora.serving.runner import Flight, Runner, StepOutput
from molora.serving.sampling import Draw, parts_of
from molora.slots import ResolvedRoute

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.filterwarnings("default")]  # compilers have much to say
if DEVICE.type == "cuda":
    pytestmark.append(pytest.mark.gpu)
BLEND = {"x": 0.5, "y": 0.25}
SOFT = RouterConfig(gate="soft", top_k=2, hidden_dim=32, key_dim=16)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    """Without a GPU the kernels run in it."""


@pytest.fixture
def make_small_bank(make_bank, make_adapter, tmp_path) -> Any:
    """A bank on a base of fewer layers: the interpreter is slow. In two of three, the router's adapters act."""

    def make(*, num_layers: int = 2, **options: Any) -> Any:
        adapters = {name: make_adapter(seed=seed, last_layer=num_layers - 1) for name, seed in (("x", 1), ("y", 2))}
        return make_bank(tmp_path, adapters=adapters, num_hidden_layers=num_layers, **options)

    return make


@pytest.fixture
def captured(monkeypatch) -> Any:
    """An engine whose small steps go through the buffers."""

    def runner(decoder: Any, **options: Any) -> Runner:
        return Runner(decoder, **{**options, "captures": True})

    class Step(captured_module._Step):
        """Runs before it is run, as capturing does."""

        def __init__(self, forward: Any, *others: Any) -> None:
            forward()
            super().__init__(forward, *others)

    made: list[Engine] = []
    monkeypatch.setattr(captured_module, "_Step", Step)

    def make(m: MoLoRA, **config: Any) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "Runner", runner)
            made.append(Engine(m, EngineConfig(**{"kv_cache_bytes": 1 << 21, "block_size": 8, **config})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize(
    ("router", "num_layers"),
    [(RouterConfig(hidden_dim=32, key_dim=16), 3), (SOFT, 2)],  # layers that are alike share what was compiled
    ids=["hard", "soft"],
)
def test_it_answers_as_full_forwards_do(make_small_bank, key_router, captured, random_ids, router, num_layers):
    bank = make_small_bank(num_layers=num_layers, router=key_router(router))
    m = molora.load(bank, device=DEVICE, dtype="float32")
    engine = captured(m, max_step_tokens=16, max_sequences=4)  # fewer tokens than the prompts have together
    routes = ["base", "x", "auto", BLEND]
    requests = [
        Request(prompt=random_ids(8 + s, seed=s), route=route, activation=4, sampling=Sampling(max_new_tokens=3))
        for s, route in enumerate(routes)
    ]
    for request, out in zip(requests, engine.generate(requests), strict=True):
        logits, expected = m.logits([out.token_ids], [4], route=request.route)
        assert logits[0, out.num_prompt_tokens - 1 : -1].argmax(-1).tolist() == out.generated_ids
        assert [[n for n, _ in route] for route in expected[0][:-1]] == [[n for n, _ in r] for r in out.routes[:-1]]
    drawn = Sampling(max_new_tokens=2, temperature=2.0, top_p=0.9, seed=3, logprobs=1, ignore_eos=True)
    request = Request(prompt=random_ids(4), route="base", sampling=drawn)
    m_alone = molora.load(m.bank, device="cpu", dtype="float32")
    out, expected = engine.generate(request)[0], m_alone.engine.generate(request)[0]
    assert out.generated_ids == expected.generated_ids
    assert [each.token_id for each in out.logprobs] == out.generated_ids
    steps = engine._runner._captured
    assert steps is not None
    assert {kind.is_routed for _, kind in steps._steps} == {True, False}
    assert {bucket for bucket, _ in steps._steps} <= set(BUCKETS)
    if DEVICE.type == "cuda":
        assert all(step._graph is not None for step in steps._steps.values())
    assert all(linear.siblings is not None for path, linear in m.decoder.linears.items() if "q_proj" in path)


def test_steps_that_are_launched_ahead_change_no_answer(make_small_bank, key_router, captured, random_ids):
    """Beside answers that go on, some end where only the host can tell, and some need their tokens known."""
    bank = make_small_bank(router=key_router())
    engine = captured(molora.load(bank, device=DEVICE, dtype="float32"), max_step_tokens=40, max_sequences=8)
    reference = molora.load(bank, device="cpu", dtype="float32").engine
    prompt = random_ids(9)
    greedy = Sampling(max_new_tokens=7, ignore_eos=True)
    (whole,) = reference.generate(Request(prompt=prompt, route="auto", activation=4, sampling=greedy))
    ahead = [
        replace(greedy, temperature=1.5, seed=1, n=2),
        replace(greedy, temperature=0.7, seed=2, top_p=0.8, min_p=0.01),
        replace(greedy, stop_token_ids=(whole.generated_ids[3],)),
        replace(greedy, stop=(whole.text[2:4],)),
        replace(greedy, max_new_tokens=1),
    ]
    known = [
        replace(greedy, repetition_penalty=1.5),
        replace(greedy, logprobs=2),
        replace(greedy, grammar=Grammar("regex", "[a-c]{4}")),
    ]
    launches: list[bool] = []
    launch = engine._steps._launch
    engine._steps._launch = lambda *, is_alone: (launches.append(is_alone), launch(is_alone=is_alone))[1]
    for ways in (ahead, [greedy, *known]):
        launches.clear()
        requests = [Request(prompt=prompt, route="auto", activation=4, sampling=sampling) for sampling in ways]
        for out, expected in zip(engine.generate(requests), reference.generate(requests), strict=True):
            assert out.generated_ids == expected.generated_ids
            assert out.text == expected.text
            assert out.finish_reason == expected.finish_reason
            assert [[n for n, _ in route] for route in out.routes] == [[n for n, _ in r] for r in expected.routes]
            assert out.num_computed_tokens + out.num_reused_tokens == len(out.token_ids) - 1
        assert (launches.count(False) >= 5) == (ways is ahead), "launched while another step is in flight"
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_recomputed_tokens == 0


def test_a_step_that_fails_takes_no_answer_with_it_that_had_ended(make_small_bank, captured, random_ids):
    """The end token comes out of step k; step k + 1, which it is in as well, cannot be launched, or fails later."""
    engine = captured(molora.load(make_small_bank(), device=DEVICE, dtype="float32"), max_sequences=4)
    sampling = Sampling(max_new_tokens=7, ignore_eos=True)
    request = Request(prompt=random_ids(9), route="base", sampling=sampling)
    (whole,) = engine.generate(request)
    ended = replace(sampling, stop_token_ids=(whole.generated_ids[3],))
    num_steps = whole.generated_ids.index(whole.generated_ids[3]) + 1
    launch = engine._runner.launch
    num_launches, fails_late = 0, False

    def failing(*step: Any) -> Flight:
        nonlocal num_launches
        num_launches += 1
        if num_launches <= num_steps:
            return launch(*step)
        if fails_late:
            return Flight(None, lambda: 1 / 0)
        raise RuntimeError("out of memory")

    engine._runner.launch = failing
    for late in (False, True):
        num_launches, fails_late = 0, late
        engine.clear_cache()
        (out,) = engine.generate(replace(request, sampling=ended))
        assert out.finish_reason == "stop"
        assert num_launches == num_steps + 1
        with pytest.raises(EngineError, match="the step failed"):
            engine.generate(request)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    engine._runner.launch = launch
    assert engine.generate(request)[0].generated_ids == whole.generated_ids


def row(num_tokens: int, first: int, *, draws: bool = True, names: tuple[str, ...] = ()) -> Row:
    blocks = range(10, 10 + (first + num_tokens + 7) // 8)
    route = ResolvedRoute(False, names, (1.0,) * len(names))
    return Row(range(5, 5 + num_tokens), first, blocks, draws, True, 0, route, None)


def on_table(buffers: Buffers) -> list[float]:
    return buffers.device["table_S5"][0].tolist()


def test_buffers_hold_a_step_and_harmless_padding():
    buffers = Buffers(
        Capacity(num_tokens=16, num_sequences=4, num_blocks=6, num_adapters=2, num_ids=100), torch.device("cpu")
    )
    for rows in (
        [row(9, 3), row(1, 20), row(2, 0, draws=False)],
        [row(1, 7)],
    ):  # the second leaves nothing of the first
        packed = pack(rows, 8, nobodys=800)
        draws = [Draw(Sampling(temperature=0.5, top_k=7), (), (), 0.25, torch.tensor([1, 2, 3, 4], dtype=torch.int32))]
        buffers.fill(packed, draws, parts_of(draws), 800)
        assert buffers.masks_SW.tolist() == [[1, 2, 3, 4], *[[-1] * 4] * 3]
        assert on_table(buffers) == [0.5, 7, 1, 0, 0.25]
        on, n = buffers.device, len(packed.ids_N)
        assert on["ids_N"].tolist() == [*packed.ids_N.tolist(), *[0] * (16 - n)]
        assert on["places_N"].tolist() == [*packed.places_N.tolist(), *[800] * (16 - n)]
        ends = [span.end for span in packed.spans]
        assert on["cu_queries_S1"].tolist() == [0, *ends, *[n] * (4 - len(ends))]
        assert on["num_keys_S"].tolist() == [*(span.num_keys for span in packed.spans), *[0] * (4 - len(ends))]
        assert on["kept_S"].tolist()[: len(packed.kept)] == packed.kept
        assert (on["start_N"] > 1 << 30).all(), "nobody is active in a step without routes"
    assert all(tensor.data_ptr() % 16 == 0 for tensor in buffers.device.values())


def test_it_warms_up_every_size_that_brings_kernels(monkeypatch, make_small_bank, key_router, captured):
    m = molora.load(make_small_bank(router=key_router()), device=DEVICE, dtype="float32")
    engine = captured(m, max_step_tokens=2048)
    runner = engine._runner
    asked: list[Any] = []
    monkeypatch.setattr(runner_module, "sizes_to_compile", lambda *args: asked.append(args) or [513, 769])
    launched: list[tuple[int, bool]] = []

    def launch(rows: Any, draws: Any) -> Flight:
        launched.append((sum(len(row.token_ids) for row in rows), rows[0].hold is not None))
        return Flight(StepOutput([], [], []))

    monkeypatch.setattr(runner, "launch", launch)
    engine._capture_steps()
    whole = min(2048, runner.num_blocks * 8)
    assert {(size, routed) for size in (*BUCKETS, 513, 769, whole) for routed in (False, True)} == set(launched)
    ((sizes, linears, _),) = asked
    assert min(sizes) > max(BUCKETS)
    assert max(sizes) < whole
    assert not any(size % 16 == 0 for size in sizes)
    assert len([*linears]) == len(m.decoder.linears)


def test_what_does_not_fit_is_run_as_it_is(m, captured):
    engine = captured(m, max_step_tokens=600, max_sequences=4, kv_cache_bytes=1 << 23)
    steps = engine._runner._captured
    assert steps.fits(pack([row(100, 0), row(1, 9)], 8, 800))
    assert not steps.fits(pack([row(520, 0)], 8, 800))
    assert not steps.fits(pack([row(1, 9)] * 5, 8, 800))


@pytest.mark.parametrize(("config", "may"), [("LlamaConfig", True), ("Qwen3MoeConfig", False)])
def test_launches_overlap_where_every_compiled_kernel_waits(monkeypatch, config, may):
    """Torch's own kernels for experts begin with one that reads nothing, and waits for nobody."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    made = getattr(transformers, config)(num_hidden_layers=2, vocab_size=64, head_dim=16, **sizes)
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, backend, options: asked.append(options) or call)
    layers = compile_layers(transformers.AutoModelForCausalLM.from_config(made), "inductor")
    assert len(layers) == len(asked) == 2
    assert asked == [{"triton.enable_pdl": True} if may else None] * 2
