"""Check that training gives PEFT's gradients, then time it beside PEFT with transformers' Trainer.

    python benchmarks/training.py --out benchmarks/results/training.json       # on a GPU
    python benchmarks/training.py --shape tiny --steps 2 --device cpu

Both sides train LoRA on all linears from the router layer on, in a model of random weights made on the device: the
same packed rows of 512 tokens from a loader, bfloat16 base and float32 adapters, AdamW, clipping, no checkpointing.
Each side runs as it does by default: ours compiles its layers on a GPU, PEFT's does not; with `--alike` also both
compiled (PEFT's by the Trainer's torch_compile), and neither. A run is one `fit` or `train`;
a step's time is the median between ends of steps, with the device waited for.

    one      one adapter, against one PEFT run
    eight    eight adapters side by side, against eight runs of PEFT's, of which one is run
    router   a router over eight frozen adapters by the language model loss, against the frozen model's forward and its
             backward down to the router layer, alone; here steps are run without a trainer, on more rows, since on
             few the host bounds a step and not the device
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from serving.figures import Report
from serving.machine import describe_machine
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from molora.checkpoint import DTYPES
from molora.injection import find_layers
from molora.routing import Routes, RoutingLayer
from molora.tiny import byte_tokenizer
from molora.training import AdapterTraining, RouterTraining
from molora.training.batches import ActivationMix, Batch
from molora.training.data import ChatData
from molora.training.examples import IGNORE, Encoder, Example
from molora.training.loss import Head, frozen_cross_entropy
from molora.training.router_losses import RouterLosses

LEAST_ONE, LEAST_EIGHT, MOST_ROUTER = 1.2, 4.0, 1.15
NUM_WARM = 5  # steps before the clock counts
MOST_DIFFERENT = {torch.float32: 1e-3, torch.bfloat16: 0.05}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights; rows of `row_length` tokens, so many a batch."""

    name: str
    config: dict[str, Any]
    router_layer: int
    row_length: int = 512
    rows: int = 16
    router_rows: int = 64
    has_targets: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "smollm2-135m",
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 64,
                "tie_word_embeddings": True,
            },
            router_layer=8,
            has_targets=True,
        ),
        Shape(
            "1b",
            {
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "tie_word_embeddings": True,
            },
            router_layer=4,
            rows=4,
            router_rows=16,
        ),
        Shape(
            "tiny",
            {
                "vocab_size": 512,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            router_layer=1,
            row_length=128,
            rows=2,
            router_rows=2,
        ),
    )
}


class Setting:
    """What both sides are given."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, num_steps: int, seed: int) -> None:
        self.shape, self.device, self.dtype, self.num_steps, self.seed = shape, device, dtype, num_steps, seed

    def model(self) -> Any:
        torch.manual_seed(self.seed)
        config = AutoConfig.for_model("llama", **self.shape.config, max_position_embeddings=2048, use_cache=False)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model.requires_grad_(False)

    def data(self, names: list[str]) -> "RandomData":
        data = RandomData(self.shape, self.seed)
        data.prepare(byte_tokenizer(), names, apart=True)
        return data

    def training(self, names: list[str], folder: str, **settings: Any) -> "RandomTraining":
        return RandomTraining(self, name=names, output_dir=folder, router_layer=self.shape.router_layer, **settings)


class RandomData(ChatData):
    """Conversations of random tokens, 40 to 90 each, whose second half is learned."""

    def __init__(self, shape: Shape, seed: int, rows: int | None = None) -> None:
        # Adapters act everywhere and on everything, as PEFT's do.
        rows = shape.rows if rows is None else rows
        super().__init__("", None, shape.row_length, rows, activation=ActivationMix(1, 0, 0, others_rest=0))
        self.vocab_size, self.random = shape.config["vocab_size"], random.Random(seed)

    def _examples(self, split: str, domains: tuple[str, ...], encoder: Encoder) -> list[Example]:
        return [self._example(domains[0]) for _ in range(64 * self.rows)]

    def _example(self, domain: str) -> Example:
        length = self.random.randint(40, 90)
        ids = tuple(self.random.randrange(3, self.vocab_size) for _ in range(length))
        learned = tuple(index >= length // 2 for index in range(length))
        return Example(ids, learned, (domain,) * length, 0, length // 2)


class RandomTraining(AdapterTraining):
    def __init__(self, setting: Setting, **arguments: Any) -> None:
        super().__init__(base="random", **arguments)
        self.setting = setting

    def load_base(self) -> None:
        self.model, self.tokenizer = self.setting.model(), byte_tokenizer()

    def write(self) -> None:
        """Nothing is kept."""


class RandomRouter(RouterTraining):
    def __init__(self, setting: Setting, **arguments: Any) -> None:
        super().__init__(base="random", **arguments)
        self.setting = setting

    def load_base(self) -> None:
        self.model, self.tokenizer = self.setting.model(), byte_tokenizer()


class Stopwatch:
    """Notes the ends of steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []

    def lap(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def step_s(self) -> float:
        return statistics.median(end - begin for begin, end in pairwise(self.ends[NUM_WARM:]))


class LightningLaps(L.Callback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.lap()


class TrainerLaps(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.lap()


def ours(setting: Setting, num_adapters: int, compiled: bool | None = None) -> tuple[float, float]:
    """Seconds a step, and the most memory in bytes, of `num_adapters` side by side; None is compiled on a GPU."""
    names = [f"adapter-{index}" for index in range(num_adapters)]
    watch = Stopwatch(setting.device)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=1,
            max_steps=NUM_WARM + 1 + setting.num_steps,
            gradient_clip_val=1.0,
            callbacks=[LightningLaps(watch)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        training = setting.training(names, folder, compile=compiled)
        memory = measured(setting, lambda: trainer.fit(training, setting.data(names)))
    return watch.step_s, memory


def peft(setting: Setting, compiled: bool = False) -> tuple[float, float]:
    """The same of one adapter, by PEFT and transformers' Trainer."""
    watch = Stopwatch(setting.device)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=setting.shape.rows,
            max_steps=NUM_WARM + 1 + setting.num_steps,
            bf16=setting.dtype == torch.bfloat16,
            optim="adamw_torch_fused" if setting.device.type == "cuda" else "adamw_torch",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=setting.device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            torch_compile=compiled,
        )
        model = peft_model(setting)
        trainer = Trainer(model, arguments, train_dataset=Rows(setting), callbacks=[TrainerLaps(watch)])
        memory = measured(setting, trainer.train)
    return watch.step_s, memory


def router(setting: Setting) -> float:
    """Seconds of a step that trains a router by the language model loss."""
    names = [f"adapter-{index}" for index in range(8)]
    with TemporaryDirectory() as folder:
        adapters = setting.training(names, folder)
        adapters.configure_model()
        for a_ERI, b_EOR in adapters.stack.pairs():
            a_ERI.normal_(0, 0.02)
            b_EOR.normal_(0, 0.02)
        for name, adapter in adapters.adapters().items():
            adapter.write(Path(folder) / name)
        training = RandomRouter(
            setting,
            adapters={name: str(Path(folder) / name) for name in names},
            output=str(Path(folder) / "bank"),
            router_layer=setting.shape.router_layer,
            losses=RouterLosses(label=0.0, lm=1.0),
        )
        training.configure_model()
    training.to(setting.device).train()
    training.on_fit_start()
    optimizer = torch.optim.AdamW(training.trained().values(), fused=setting.device.type == "cuda")

    def step(batch: Batch) -> None:
        training._loss(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds_a_step(setting, names, step)


def frozen(setting: Setting) -> float:
    """Seconds of the frozen model's forward and loss, and of its backward down to the router layer."""
    model = setting.model()
    layers = find_layers(model)
    for layer in layers:
        if setting.device.type == "cuda":
            layer.compile(dynamic=False)

    layers[setting.shape.router_layer] = GradientFromHere(layers[setting.shape.router_layer])

    def step(batch: Batch) -> None:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        hidden = model.get_decoder()(**inputs).last_hidden_state
        learned = batch.targets != IGNORE
        frozen_cross_entropy(hidden[learned], Head.of(model), batch.targets[learned])[0].mean().backward()

    return seconds_a_step(setting, ["adapter-0"], step)


class GradientFromHere(RoutingLayer):
    """A layer at whose input the backward pass ends."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(layer, Routes(0), None, None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden_states.detach().requires_grad_(), *args, **kwargs)


def seconds_a_step(setting: Setting, names: list[str], step: Callable[[Batch], None]) -> float:
    data = RandomData(setting.shape, setting.seed, setting.shape.router_rows)
    data.prepare(byte_tokenizer(), names)
    watch = Stopwatch(setting.device)
    for batch, _ in zip(data.train_dataloader(), range(NUM_WARM + 1 + setting.num_steps), strict=False):
        step(batch.to(setting.device))
        watch.lap()
    return watch.step_s


def peft_model(setting: Setting) -> Any:
    shape = setting.shape
    layers = list(range(shape.router_layer, shape.config["num_hidden_layers"]))
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(TARGETS), layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    return get_peft_model(setting.model(), config)


class Rows(IterableDataset[dict[str, Tensor]]):
    """The rows of our loader, one after the other, as transformers' models read them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.setting.data(["adapter-0"]).train_dataloader():
            yield from rows_of(batch)


def rows_of(batch: Batch) -> list[dict[str, Tensor]]:
    labels = batch.targets.roll(1, 1)  # transformers shifts them back
    labels[:, 0] = IGNORE
    return [
        {"input_ids": ids, "position_ids": positions, "labels": own}
        for ids, positions, own in zip(batch.input_ids, batch.position_ids, labels, strict=True)
    ]


def measured(setting: Setting, run: Callable[[], object]) -> float:
    """The most memory in bytes that a run takes on a GPU; 0 elsewhere."""
    gc.collect()
    if setting.device.type != "cuda":
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return float(torch.cuda.max_memory_allocated())


def check_gradients(setting: Setting, report: Report) -> None:
    """Loss and gradients of one batch, by both sides, with adapters that act.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    theirs = peft_model(setting)
    training = setting.training(["adapter-0"], "nowhere")
    training.configure_model()
    batch = next(iter(setting.data(["adapter-0"]).train_dataloader())).to(setting.device)
    theirs_too = []
    generator = torch.Generator().manual_seed(setting.seed)
    for path, (a_ERI, b_EOR) in zip(training.stack.linears, training.stack.pairs(), strict=True):
        module = theirs.get_submodule(f"base_model.model.{path}")
        for mine, other in ((a_ERI, module.lora_A["default"].weight), (b_EOR, module.lora_B["default"].weight)):
            values = torch.randn(other.shape, generator=generator) * 0.02
            mine[0].copy_(values)
            other.data.copy_(values)
            theirs_too.append(other)
    loss = training.training_step(batch, 0)
    loss.backward()
    rows = rows_of(batch)
    with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
        other_loss = theirs(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss
    other_loss.backward()
    assert training.stack.values.grad is not None
    other = torch.cat([parameter.grad.flatten().float() for parameter in theirs_too])
    difference = ((training.stack.values.grad[0] - other).norm() / other.norm()).item()
    if not (difference <= MOST_DIFFERENT[setting.dtype] and abs(loss.item() / other_loss.item() - 1) < 1e-2):
        raise SystemExit(f"wrong: gradients differ by {difference:.3g}, losses are {loss.item()}, {other_loss.item()}")
    report.checked("gradients are PEFT's", difference=difference, loss=loss.item(), peft_loss=other_loss.item())


def compare(
    setting: Setting, report: Report, how: str, is_compiled: bool | None, is_peft_compiled: bool, num_turns: int
) -> None:
    """Time and memory of one adapter, and of eight, beside PEFT's; the targets are those of the defaults."""
    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "peft": lambda: peft(setting, is_peft_compiled),
        "one": lambda: ours(setting, 1, is_compiled),
        "eight": lambda: ours(setting, 8, is_compiled),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(num_turns):
        for name, side in sides.items():
            found[name].append(side())
    step_s = {name: min(seconds for seconds, _ in turns) for name, turns in found.items()}
    memory = {name: turns[0][1] for name, turns in found.items()}
    tokens = setting.shape.rows * setting.shape.row_length
    for name, num_adapters, least in (("one", 1, LEAST_ONE), ("eight", 8, LEAST_EIGHT)):
        report.add(
            f"{name}{how}: PEFT's time over ours",
            num_adapters * step_s["peft"] / step_s[name],
            "x",
            at_least=None if how else least,
            step_ms=1e3 * step_s[name],
            peft_step_ms=1e3 * step_s["peft"],
            tokens_per_s=num_adapters * tokens / step_s[name],
            memory_gb=memory[name] / 1e9,
            peft_memory_gb=memory["peft"] / 1e9,
        )
        if memory["peft"]:
            report.add(f"{name}{how}: memory over one PEFT run's", memory[name] / memory["peft"], "x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be given several times")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--steps", type=int, default=20, help="that are clocked")
    parser.add_argument("--turns", type=int, default=2, help="of both sides, of which the faster one counts")
    parser.add_argument("--alike", action="store_true", help="also with both sides compiled, and neither")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write; a table in Markdown comes beside it")
    args = parser.parse_args()
    shapes = [SHAPES[name] for name in args.shape or ("smollm2-135m", "1b")]
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    head = describe_machine(device) | {"dtype": args.dtype, "shape": ", ".join(shape.name for shape in shapes)}
    report = Report(head | {"steps": args.steps, "turns": args.turns, "seed": args.seed}, args.out)
    for shape in shapes:
        report.suite, report.has_targets = shape.name, shape.has_targets
        setting = Setting(shape, device, dtype, args.steps, args.seed)
        check_gradients(setting, report)
        compare(setting, report, "", None, False, args.turns)
        if args.alike:
            compare(setting, report, ", both compiled", True, True, args.turns)
            compare(setting, report, ", neither compiled", False, False, args.turns)
        whole_s, frozen_s = (min(side(setting) for _ in range(args.turns)) for side in (router, frozen))
        report.add(
            "router: by the language model loss, over the frozen passes",
            whole_s / frozen_s,
            "x",
            at_most=MOST_ROUTER,
            rows=shape.router_rows,
            step_ms=1e3 * whole_s,
            frozen_step_ms=1e3 * frozen_s,
        )
    print(f"\n{head['device']}, {head['commit']}\n\n{report.table()}")


if __name__ == "__main__":
    main()
