"""The loss behind a frozen head is what the model's own logits give, and so is its gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from molora.checkpoint import load_base
from molora.tiny import make_tiny_base
from molora.training import loss
from molora.training.loss import Head, check_head, frozen_cross_entropy


@pytest.mark.parametrize("max_logits", [1, 512 * 5, 1 << 28], ids=["a token", "five tokens", "all"])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_losses_and_gradients_are_those_of_the_models_own_logits(
    architecture: str, overrides: dict[str, Any], max_logits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "MAX_LOGITS", max_logits)
    folder = make_tiny_base(tmp_path / "base", seed=0, architecture=architecture, **overrides)
    model: Any = load_base(folder, device="cpu")[0].double()
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(3, 250, (1, 13), generator=generator) for _ in range(2))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    weights = torch.rand(13, generator=generator, dtype=torch.float64)
    found = []
    for is_ours in (True, False):
        inputs = embeddings.clone().requires_grad_()
        if is_ours:
            hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
            losses, is_right = frozen_cross_entropy(hidden, Head.of(model), targets[0])
            without = frozen_cross_entropy(hidden.detach(), Head.of(model), targets[0])
            torch.testing.assert_close(without[0].double(), losses.detach().double(), rtol=1e-5, atol=1e-6)
            assert torch.equal(without[1], is_right)
        else:
            logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
            losses = F.cross_entropy(logits, targets[0], reduction="none")
            is_right = (logits.argmax(-1) == targets[0]).float()
        (losses * weights).sum().backward()
        found.append((losses.detach().double(), is_right, inputs.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert found[0][2].abs().max() > 1e-3


def test_a_head_that_does_something_else_is_refused(tmp_path: Path) -> None:
    model: Any = load_base(make_tiny_base(tmp_path / "base", seed=0), device="cpu")[0]
    check_head(model)
    model.config.logits_scaling = 8.0  # which Llama knows nothing of, as others multiply where Granite divides
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM does more to its logits"):
        check_head(model)


def test_nothing_learned_is_no_loss() -> None:
    head = Head(torch.randn(7, 4), None)
    hidden = torch.randn(0, 4, requires_grad=True)
    losses, _ = frozen_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)
