"""transformers' own `generate` inside `m.routing(...)`: every way to decode gives what routed full forwards say."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer

from molora import MoLoRA, RouterConfig
from molora.checkpoint import load_base

START, NUM_NEW = 7, 16
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NUM_NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
ROUTERS = [RouterConfig(hidden_dim=32, key_dim=16), RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4)]
pytestmark = pytest.mark.filterwarnings("default")  # transformers deprecates what its own assistants pass


@pytest.fixture(params=["auto", "x", "base"])
def route(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=ROUTERS, ids=["router", "with a LoRA"])
def m(request: pytest.FixtureRequest, load_model: Callable[..., MoLoRA]) -> MoLoRA:
    return load_model(router=request.param)


@pytest.fixture
def ids(random_ids: Callable[..., list[int]]) -> torch.Tensor:
    return torch.tensor([random_ids(20)])


def greedy(m: MoLoRA, ids: torch.Tensor, route: Any) -> list[int]:
    """By full forwards."""
    found = ids[0].tolist()
    for _ in range(NUM_NEW):
        logits, _ = m.logits([found], [START], route=route)
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
    ],
    ids=str,
)
def test_greedy_decoding(m: MoLoRA, ids: torch.Tensor, route: Any, how: dict[str, Any]) -> None:
    with m.routing([START], route):
        assert m.model.generate(ids, **OPTIONS, **how)[0].tolist() == greedy(m, ids, route)


def test_nothing_is_added_below_the_router_layer_unless_it_acts_there(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    plans = []
    attention = m.model.get_decoder().layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: plans.append(m.decoder.early_routes.plan))
    with m.routing([START], route):
        m.model(ids)
    m.logits(ids, [START], route=route)
    assert [plan is not None for plan in plans] == [route == "auto" and bool(m.decoder.prepares)] * 2


def test_an_assistant_model(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    """The base, which guesses as one without adapters does."""
    assistant, _ = load_base(m.base_dir, device="cpu", dtype="float32")
    with m.routing([START], route):
        assert m.model.generate(ids, assistant_model=assistant, **OPTIONS)[0].tolist() == greedy(m, ids, route)


def test_beams(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    with m.routing([START] * 3, route):
        cached, plain = (
            m.model.generate(ids, num_beams=3, num_return_sequences=3, use_cache=use_cache, **OPTIONS).tolist()
            for use_cache in (True, False)
        )
    assert cached == plain


def test_a_streamer(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    streamer = TextIteratorStreamer(m.tokenizer, skip_prompt=True, timeout=60)

    def run() -> None:
        with m.routing([START], route):
            m.model.generate(ids, streamer=streamer, **OPTIONS)

    thread = Thread(target=run)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == m.tokenizer.decode(greedy(m, ids, route)[ids.shape[1] :])


def test_sampling_is_of_the_routed_distribution(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    options = OPTIONS | {"do_sample": True, "top_k": 0, "output_logits": True, "return_dict_in_generate": True}
    with torch.random.fork_rng(devices=[]), m.routing([START], route):
        torch.manual_seed(0)
        out = m.model.generate(ids, **options)
    logits, _ = m.logits([out.sequences[0].tolist()], [START], route=route)
    # Another route changes them by 1 and more. A random model's small states grow float32's rounding a thousandfold.
    torch.testing.assert_close(torch.cat(out.logits), logits[0, ids.shape[1] - 1 : -1], rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "how",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "force_words_ids": [[5]]},
    ],
    ids=["contrastive search", "DoLa", "group beams", "constrained beams"],
)
def test_what_is_code_on_the_hub_is_refused(m: MoLoRA, ids: torch.Tensor, how: dict[str, Any]) -> None:
    """transformers moved these there, and asks before it runs them; it is not asked to where they are trusted."""
    with m.routing([START], "auto"), pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        m.model.generate(ids, **(OPTIONS | how))
    with m.routing([START], "auto"), pytest.raises(RuntimeError, match=r"inside m\.routing.* code on the hub"):
        m.model.generate(ids, trust_remote_code=True, **(OPTIONS | how))


def test_a_way_to_decode_of_a_folder_is_refused_inside(m: MoLoRA, ids: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("def generate(model, **inputs):\n    raise SystemExit\n")
    with m.routing([START], "auto"), pytest.raises(RuntimeError, match=r"inside m\.routing.* code on the hub"):
        m.model.generate(ids, custom_generate=str(tmp_path), trust_remote_code=True, **OPTIONS)
    assert "load_custom_generate" not in vars(m.model)


def test_continuous_batching_is_refused_inside(m: MoLoRA, ids: torch.Tensor, route: Any) -> None:
    """transformers packs its prompts in rows, where nobody could say which start and route are whose."""
    config = GenerationConfig(**OPTIONS)
    for ways_in in (
        lambda: m.model.generate_batch(ids.tolist(), config),
        lambda: m.model.generate(ids, cache_implementation="paged", **OPTIONS),
        lambda: m.model.init_continuous_batching(config),
    ):
        with m.routing([START], route):
            with m.routing([START], "base"):
                pass
            with pytest.raises(RuntimeError, match=r"continuous batching .* m\.engine\.generate answers many"):
                ways_in()
    assert "init_continuous_batching" not in vars(m.model)


def test_continuous_batching_outside_is_the_bases(m: MoLoRA, random_ids: Callable[..., list[int]]) -> None:
    prompts = [random_ids(20), random_ids(9, seed=1)]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes most of the memory
    found = m.model.generate_batch(prompts, GenerationConfig(**OPTIONS), small)
    for prompt, output in zip(prompts, found.values(), strict=True):
        assert [*prompt, *output.generated_tokens] == greedy(m, torch.tensor([prompt]), "base")
    prompt = torch.tensor(prompts[:1])
    with m.routing([START], "x"):  # and the model's own attention is back
        assert m.model.generate(prompt, **OPTIONS)[0].tolist() == greedy(m, prompt, "x")


@torch.inference_mode()
def test_the_sequences_of_a_packed_row_share_its_start(
    m: MoLoRA, route: Any, random_ids: Callable[..., list[int]]
) -> None:
    """Each is active from its own token of that index."""
    one, other = random_ids(13), random_ids(17, seed=1)
    positions = torch.tensor([[*range(len(one)), *range(len(other))]])
    packed = torch.tensor([[*one, *other]])
    with m.routing([START], route):
        logits = m.model(packed, position_ids=positions, use_cache=False).logits
    alone = [m.logits([each], [START], route=route)[0][0] for each in (one, other)]
    torch.testing.assert_close(logits[0], torch.cat(alone), rtol=0, atol=0.05)
    with m.routing([START, START], "x"), pytest.raises(ValueError, match="this batch has 1 sequences, but activation"):
        m.model(packed, position_ids=positions, use_cache=False)
