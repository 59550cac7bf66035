"""The two training modules, end to end on a tiny random base."""

import csv
import itertools
import json
import math
import runpy
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import molora
from molora.adapter import Adapter
from molora.bank import Bank
from molora.checkpoint import resolve_base
from molora.routing import RouteRequest
from molora.training import adapter as adapter_module
from molora.training.adapter import AdapterTraining
from molora.training.batches import ActivationMix, PackedLoader
from molora.training.data import ChatData
from molora.training.examples import encode, examples, read_records
from molora.training.frozen import Schedule
from molora.training.newcomer import key_from_data
from molora.training.router import RouterTraining
from molora.training.router_losses import NUM_FIRST, RouterLosses, begin_parts, neighbours
from molora.training.router_report import router_statistics
from molora.training.stack import StackedLinear
from molora.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
# Lightning and jsonargparse warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("default")
HALF = ("--data.rows", "2")  # of what the file has, and of the time: where nothing needs to be learned well


@pytest.fixture(autouse=True)
def _in_an_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")


def fit(*extra: str, config: str = "configs/tiny.yaml") -> None:
    arguments = ["train.py", "fit", "--config", config, "--trainer.enable_progress_bar", "false", *extra]
    with patch.object(sys, "argv", arguments):
        runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")


def complaint(capsys: pytest.CaptureFixture[str], *extra: str, config: str = "configs/tiny.yaml") -> str:
    """The last line on standard error of a run that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        fit(*extra, config=config)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def column(file: Path, name: str) -> list[float]:
    with file.open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Adapter.read(folder).tensors()


def router_config(*, alpha: float = 8.0, **changes: Any) -> str:
    """A config that trains a router over two adapters that were never trained (their B is random too)."""
    base = resolve_base("tiny-random/llama")
    model, _ = molora.checkpoint.load_base(base, device="cpu")
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in path and ".layers.0." not in path
    }
    generator = torch.Generator().manual_seed(0)
    for name in ("letters", "digits"):
        adapter = molora.adapter.random_adapter(linears, rank=4, alpha=alpha, generator=generator)
        adapter.write(Path("adapters") / name)
    config = yaml.safe_load(Path("configs/tiny.yaml").read_text())
    config["model"] = {
        "class_path": "molora.training.RouterTraining",
        "init_args": {
            "adapters": ["adapters/letters", "adapters/digits"],
            "output": "bank",
            "base": "tiny-random/llama",
            "router": {"hidden_dim": 32, "key_dim": 16},
            "router_layer": 1,
            "schedule": {"lr": 0.01, "warmup_steps": 5},
            **changes,
        },
    }
    Path("router.yaml").write_text(yaml.safe_dump(config))
    return "router.yaml"


@pytest.mark.parametrize(
    ("config", "extra", "words"),
    [
        ("configs/tiny.yaml", ("--data.train", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (
            "configs/router.yaml",
            ("--model.init_args.base=tiny-random/llama",),  # it is loaded before
            "runs/adapters/arithmetic is not a PEFT adapter folder",
        ),
        ("configs/tiny.yaml", ("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(config, extra, words, capsys):
    error = complaint(capsys, *extra, "--trainer.logger", "false", config=config)
    assert error.startswith("error: ")
    assert words in error


def test_tiny_yaml_learns_and_writes_a_peft_folder_and_logs() -> None:
    fit()
    adapter = Adapter.read("runs/tiny/adapters/letters")
    assert adapter.layers == (1, 2, 3)
    assert adapter.config.alora_invocation_tokens is not None
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    losses = column(metrics, "train/loss")
    assert losses[-1] < 0.5 * losses[0]
    assert column(metrics, "val/loss")[-1] < losses[0]
    assert list(Path("runs/tiny").rglob("events.out.tfevents*"))


def test_early_stopping_ends_in_an_adapter_that_is_written() -> None:
    fit(
        "--trainer.val_check_interval=10",
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.patience=1",
        "--trainer.callbacks.min_delta=100",  # so nothing is ever an improvement after the first
    )
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    assert column(metrics, "step")[-1] < 30  # of 60
    assert Adapter.read("runs/tiny/adapters/letters").layers == (1, 2, 3)


def test_a_trained_adapter_loads_in_peft() -> None:
    peft = pytest.importorskip("peft")
    fit("--trainer.max_steps", "3")
    base = molora.checkpoint.load_base(resolve_base("tiny-random/llama"), device="cpu")[0]
    config = peft.PeftConfig.from_pretrained("runs/tiny/adapters/letters")
    assert config.alora_invocation_tokens
    model = peft.PeftModel.from_pretrained(base, "runs/tiny/adapters/letters")
    assert model.active_adapters == ["default"]


def test_resuming_gives_exactly_the_uninterrupted_result() -> None:
    short = (*HALF, "--trainer.max_steps", "30")
    fit(*short, "--model.init_args.output_dir", "whole")
    fit(
        *short,
        "--ckpt_path",
        next(str(path) for path in Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")),
        "--model.init_args.output_dir",
        "resumed",
    )
    whole, resumed = weights(Path("whole/letters")), weights(Path("resumed/letters"))
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key


def test_checkpoints_hold_only_what_is_trained() -> None:
    fit("--trainer.max_steps", "20")
    (path,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    assert set(state) == {"stack.values"}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_trainers_precision_is_obeyed(precision: str) -> None:
    fit("--trainer.max_steps", "20", "--trainer.precision", precision)
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    losses = column(metrics, "train/loss")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "losses",
    [
        {"label": 1.0, "given": 1.0, "drift": 0.03, "newcomer": 1.0, "switch": 0.1},
        {"label": 0.0, "lm": 1.0, "token": 1.0, "balance": 0.01},
    ],
)
def test_a_router_stays_in_float32_at_any_precision(precision: str, losses: dict[str, float]) -> None:
    router = {"hidden_dim": 32, "key_dim": 16, "lora_rank": 2}
    short = (*HALF, "--trainer.max_steps", "6", "--trainer.precision", precision)
    fit(*short, config=router_config(router=router, losses=losses))
    learned = Bank.open("bank").load_router()
    assert isinstance(learned, molora.KeyRouter)
    for values in (learned.keys_CD, learned.query.weight, learned.hidden.weight):
        assert values.dtype is torch.float32
        assert not torch.equal(values, values.bfloat16().float())


def test_recomputed_layers_keep_the_bases_dropout_off() -> None:
    training = AdapterTraining("x", base="tiny-random/llama", router_layer=1, rank=2, gradient_checkpointing=True)
    training.configure_model()
    training.on_fit_start()
    assert not any(module.training for module in training.model.model.layers.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_changes_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # what needs no C++ compiler
    short = (*HALF, "--trainer.max_steps", "5", "--model.init_args.output_dir")
    fit(*short, "plain")
    fit(*short, "less", "--model.init_args.gradient_checkpointing=true", f"--model.init_args.compile={compiled}")
    for key, tensor in weights(Path("plain/letters")).items():
        torch.testing.assert_close(tensor, weights(Path("less/letters"))[key])


@pytest.mark.parametrize(
    ("losses", "adapter_lr"),
    [({"given": 1.0, "drift": 0.1}, None), ({"label": 0.0, "lm": 1.0}, 0.01), ({"label": 1.0, "drift": 0.1}, None)],
)
def test_gradient_checkpointing_changes_nothing_of_a_router(
    losses: dict[str, float], adapter_lr: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though by then other tokens have been routed through the same linears, or none."""
    forward, calls, num_calls = StackedLinear.forward, [0], []

    def counted(self: StackedLinear, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return forward(self, x)

    monkeypatch.setattr(StackedLinear, "forward", counted)
    router = {"hidden_dim": 32, "key_dim": 16, "lora_rank": 2}
    found = []
    for output, less in (("plain", False), ("less", True)):
        calls[0] = 0
        changes = {"router": router, "losses": losses, "adapter_lr": adapter_lr, "gradient_checkpointing": less}
        fit(*HALF, "--trainer.max_steps", "5", config=router_config(output=output, **changes))
        num_calls.append(calls[0])
        found.append([load_file(file) for file in sorted(Path(output).rglob("*.safetensors"))])
    assert num_calls[1] > num_calls[0]
    assert len(found[0]) == len(found[1]) == 3
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("by_name", [False, True])
def test_adapters_that_are_trained_side_by_side_become_what_each_becomes_alone(by_name: bool) -> None:
    names, ranks = ("letters", "digits"), {"letters": 4, "digits": 2} if by_name else {"letters": 4, "digits": 4}
    short = ("--trainer.max_steps", "8", "--trainer.gradient_clip_val", "0.1", "--trainer.val_check_interval", "4")
    for name in names:
        rank = ("--model.init_args.rank", str(ranks[name]))
        fit(*short, *rank, "--model.init_args.output_dir", "alone", "--model.init_args.name", name)
    source = "configs/tiny.jsonl"
    sources = json.dumps({name: source for name in names}) if by_name else source
    fit(
        *short,
        "--model.init_args.output_dir",
        "together",
        "--model.init_args.name",
        json.dumps(names),
        "--model.init_args.rank",
        json.dumps(ranks) if by_name else "4",
        "--data.train",
        sources,
        "--data.val",
        sources,
    )
    for name in names:
        alone, together = weights(Path("alone") / name), weights(Path("together") / name)
        assert any(tensor.any() for key, tensor in alone.items() if "lora_B" in key)
        assert Adapter.read(Path("together") / name).config.r == ranks[name]
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-2, atol=1e-4)
    letters, digits = (weights(Path("together") / name) for name in names)
    assert any((digits[key][:2, :2] - letters[key][:2, :2]).abs().max() > 1e-2 for key in digits)
    (metrics,) = [path for path in Path("runs/tiny").rglob("metrics.csv") if "digits" in path.read_text()]
    assert column(metrics, "val/digits/loss")


def test_the_router_learns_the_domains_and_writes_a_bank() -> None:
    fit(config=router_config())
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    assert column(metrics, "train/routed_right")[-1] > 0.9
    bank = Bank.open("bank")
    assert [entry.name for entry in bank.routable] == ["letters", "digits"]
    m = molora.load(bank, device="cpu")
    out = m.generate([{"role": "user", "content": "3 times a"}], max_new_tokens=3)
    assert {name for route in out.generated_routes for name, _ in route} == {"letters"}


PLOTS = {f"router/{name}" for name in ("confusion", "load", "calibration", "entropy", "switches")}
RATES = ("val/entropy", "val/switch_rate", "val/ece")


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_validation_of_a_router_is_logged_as_scalars_and_plots() -> None:
    config = yaml.safe_load(Path(router_config()).read_text())
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "second"}}
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 10}
    config["trainer"]["logger"].append(logger)
    Path("router.yaml").write_text(yaml.safe_dump(config))
    fit(config="router.yaml")
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    folders = [path.parent for path in Path().rglob("events.out.tfevents*")]
    assert len(folders) == 2
    for log in map(events, folders):
        assert set(log.Tags()["images"]) == PLOTS
        for name in PLOTS:
            images = log.Images(name)
            assert [image.step for image in images] == [10, 20]  # and none of the sanity check
            assert all(image.width > 300 and image.height > 200 for image in images)
        for name in RATES:
            assert [scalar.value for scalar in log.Scalars(name)] == pytest.approx(column(metrics, name), rel=1e-3)
    assert all(0 < entropy < math.log(3) for entropy in column(metrics, "val/entropy"))


@pytest.mark.parametrize("is_labelled", [False, True])
def test_a_router_that_learns_without_labels_is_logged_by_all_that_it_routes(is_labelled: bool) -> None:
    records = [*read_records("configs/tiny.jsonl")]
    if not is_labelled:
        plain = [each for each in records if all(isinstance(said["content"], str) for said in each["messages"])]
        records = [{"messages": record["messages"]} for record in plain]
    Path("val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = router_config(losses={"label": 0.0, "lm": 1.0})
    fit("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.val", "val.jsonl", config=config)
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    (folder,) = [path.parent for path in Path("runs/tiny").rglob("events.out.tfevents*")]
    log, of_labels = events(folder), {"router/confusion", "router/calibration"}
    assert set(log.Tags()["images"]) == (PLOTS if is_labelled else PLOTS - of_labels)
    assert ("val/ece" in log.Tags()["scalars"]) == is_labelled
    assert 0 < column(metrics, "val/entropy")[0] < math.log(3)


def test_what_is_logged_of_a_validation_is_what_the_router_does() -> None:
    config = router_config(schedule={"lr": 0.0}, router={"hidden_dim": 32, "key_dim": 16, "temperature": 0.5})
    fit("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", config=config)
    m = molora.load("bank", device="cpu")
    data = examples(read_records("configs/tiny.jsonl"), m.tokenizer, max_length=256)
    loader = PackedLoader(
        data,
        ["base", "letters", "digits"],
        row_length=256,
        rows=4,
        pad_id=0,
        mix=ActivationMix(),
        seed=0,
        num_batches=2,
    )
    entropies, changes, is_sure, is_right = [], [], [], []
    for batch in loader:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        with torch.no_grad():
            probs = (m.decoder.router.scores(m.decoder.router_input(**inputs)) / 0.5).softmax(-1)
        for row, column_ in itertools.product(range(4), range(256)):
            place, before = (row, column_), (row, column_ - 1)

            def counts(place: tuple[int, int], batch: Any = batch) -> bool:
                return bool(batch.position_ids[place] >= batch.start[place] and batch.domains[place] >= 0)

            if not counts(place):
                continue
            entropies.append(-(probs[place] * probs[place].log()).sum())
            is_sure.append(float(probs[place].max()))
            is_right.append(int(probs[place].argmax() == batch.domains[place]))
            if batch.position_ids[place] > 0 and counts(before):
                changes.append(float(probs[place].argmax() != probs[before].argmax()))
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    assert column(metrics, "val/entropy") == pytest.approx([float(torch.stack(entropies).mean())], rel=1e-4)
    assert column(metrics, "val/switch_rate") == pytest.approx([sum(changes) / len(changes)])
    bins = [min(int(15 * each), 14) for each in is_sure]
    gaps = [
        sum(sure - right for sure, right, each in zip(is_sure, is_right, bins, strict=True) if each == b)
        for b in range(15)
    ]
    assert column(metrics, "val/ece") == pytest.approx([sum(map(abs, gaps)) / len(bins)], rel=1e-3)


@pytest.mark.parametrize("extra", [("--data.val", "null"), ("--trainer.limit_val_batches", "0")])
def test_training_without_validation_logs_nothing_of_it(extra: tuple[str, str]) -> None:
    fit("--trainer.max_steps", "10", *extra, config=router_config())
    (folder,) = [path.parent for path in Path("runs/tiny").rglob("events.out.tfevents*")]
    log = events(folder)
    assert log.Tags()["images"] == []
    assert log.Tags()["scalars"]
    assert not set(log.Tags()["scalars"]) & set(RATES)


def test_a_price_on_switches_makes_them_fewer() -> None:
    last = []
    for price in (0.0, 1.0):
        fit(config=router_config(losses={"label": 1.0, "switch": price}))
        (metrics,) = Path("runs/tiny").rglob("metrics.csv")
        last.append([column(metrics, f"train/{name}")[-1] for name in ("switch", "label")])
        shutil.rmtree("runs")
    (switches, label), (priced_switches, priced_label) = last
    assert priced_switches < 0.7 * switches
    assert priced_label < 1.3 * label


def ask(question: str, answer: str, **labels: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **labels}


def test_a_router_that_practises_on_newcomers_gives_their_tokens_to_their_key() -> None:
    letters = [ask(f"{n} times {c}", c * n, domain="letters") for n in range(2, 6) for c in "abcdefgh"]
    digits = [ask(f"{a} plus {b}", str(a + b), domain=None, task="sums") for a in range(6) for b in range(4)]
    Path("old.jsonl").write_text("".join(json.dumps(each | {"labels_only": True}) + "\n" for each in letters + digits))
    found = []
    for weight in (1e-9, 1.0):
        config = router_config(adapters=["adapters/letters"], losses={"label": 1.0, "newcomer": weight})
        fit("--data.train", "old.jsonl", "--data.val", "null", config=config)
        (metrics,) = Path("runs/tiny").rglob("metrics.csv")
        found.append(column(metrics, "train/newcomer")[-1])
        shutil.rmtree("runs")
    assert found[1] < 0.9 * found[0]
    m = molora.load("bank", device="cpu", dtype="float32")
    key = key_from_data(m, [each | {"domain": "sums"} for each in digits[:12]], "sums")
    assert key.share > 0.9
    Bank.open("bank").add("adapters/digits", name="sums", activation="turn", key=key.values_D)
    m = molora.load("bank", device="cpu", dtype="float32")
    encoded = [encode(each, m.tokenizer) for each in (*letters, *(each | {"domain": "sums"} for each in digits[12:]))]
    assert router_statistics(m, encoded, [example.turn for example in encoded]).accuracy > 0.9


def test_a_blend_of_a_validation_run_may_be_trained_on() -> None:
    training, batch = router_training(losses=RouterLosses(given=1.0))
    with torch.inference_mode():
        training._loss(batch)
    training._loss(batch)[0].backward()
    assert training.router.keys_CD.grad is not None


def test_a_key_needs_a_router_of_keys_and_tokens_of_the_domain() -> None:
    fit("--trainer.max_steps", "1", config=router_config())
    m = molora.load("bank", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="no token of the domain 'sums' where adapters act, but of digits, letters"):
        key_from_data(m, "configs/tiny.jsonl", "sums")
    nameless = [ask("2 times a", "aa"), {"prompt": "3 times b", "completion": "bbb"}]
    key = key_from_data(m, nameless, "letters")  # an adapter's own data may name no domain
    assert key.values_D.shape == (16,)
    assert key.taken is None
    assert key_from_data(m, "configs/tiny.jsonl", "digits").taken is not None  # there are letters beside them
    Bank.open("bank").set_router(None)
    with pytest.raises(ValueError, match="has no router of keys"):
        key_from_data(molora.load("bank", device="cpu", dtype="float32"), "configs/tiny.jsonl", "letters")


def row_of(**fields: list[int]) -> Any:
    """A batch of one row, of which only these fields are read."""
    return SimpleNamespace(**{name: torch.tensor([values]) for name, values in fields.items()})


def test_neighbours_are_active_of_one_conversation_and_not_of_two_domains() -> None:
    active = torch.tensor([[False, True, True, True, True, True, True, True]])
    batch = row_of(position_ids=[0, 1, 2, 3, 4, 0, 1, 2], domains=[1, 1, 1, 2, -100, 2, -100, -1])
    assert neighbours(batch, active).tolist() == [False, False, True, False, True, False, True, True]


def test_parts_begin_where_an_answer_does_or_its_domain_changes() -> None:
    def found(positions: list[int], targets: list[int], domains: list[int]) -> list[int]:
        batch = row_of(position_ids=positions, targets=targets, domains=domains)
        return torch.nonzero(begin_parts(batch)).flatten().tolist()

    written = [-100, -100, 5, 6, 7, 8, -100, 9, 9, 9]
    own = [2, 1, 1, 1, 2, 2, 2, 2, 2, -100]
    assert found([0, 1, 2, 3, 4, 5, 6, 0, 1, 2], written, own) == [2, 3, 4, 5, 7, 8, 9]
    length = 3 * NUM_FIRST
    assert found([*range(length)], [-100, *[5] * (length - 1)], [1] * length) == [*range(1, 1 + NUM_FIRST)]
    assert found([*range(length)], [5] * length, [1] * (NUM_FIRST + 2) + [2] * (2 * NUM_FIRST - 2)) == [
        *range(NUM_FIRST),
        *range(NUM_FIRST + 2, 2 * NUM_FIRST + 2),
    ]
    assert found([0, 1, 2, 0, 1, 2], [5] * 6, [1] * 6) == [*range(6)]  # two conversations


def test_the_beginnings_of_parts_may_count_more() -> None:
    found = []
    for weight in (0.0, 3.0):
        fit(config=router_config(losses={"parts": weight}))
        (metrics,) = Path("runs/tiny").rglob("metrics.csv")
        found.append(column(metrics, "train/parts")[-1])
        shutil.rmtree("runs")
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("losses", [{}, {"given": 1.0}], ids=["labels", "given"])
def test_a_router_with_a_lora_of_its_own(losses: dict[str, float]) -> None:
    config = router_config(router={"hidden_dim": 32, "key_dim": 16, "lora_rank": 4}, losses=losses)
    fit(config=config)
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    assert column(metrics, "train/routed_right")[-1] > 0.9
    if "given" in losses:
        assert column(metrics, "train/given")[-1] < column(metrics, "train/given")[0]
    (path,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    assert "lora.values" in torch.load(path, weights_only=False)["state_dict"]
    router = Bank.open("bank").load_router()
    assert isinstance(router, molora.KeyRouter)
    assert {path.split(".")[2] for path in router.lora} == {"0"}
    assert all(weights.b_OR.abs().sum() > 0 for weights in router.lora.values())


@pytest.mark.parametrize(
    ("lora_rank", "losses"),
    [(4, {"given": 1.0, "drift": 0.03}), (0, {"label": 1.0, "newcomer": 1.0})],
    ids=["with a LoRA", "with what it knows of newcomers"],
)
def test_a_router_resumes_exactly(lora_rank: int, losses: dict[str, float]) -> None:
    config = router_config(router={"hidden_dim": 32, "key_dim": 16, "lora_rank": lora_rank}, losses=losses)
    fit(*HALF, "--trainer.max_steps", "30", config=config)
    whole = Bank.open("bank").load_router()
    shutil.rmtree("bank")
    (checkpoint,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    fit(*HALF, "--trainer.max_steps", "30", "--ckpt_path", str(checkpoint), config=config)
    resumed = Bank.open("bank").load_router()
    assert whole is not None
    assert resumed is not None
    assert resumed.digest == whole.digest


def test_a_routers_lora_is_kept_from_drifting() -> None:
    drifts = []
    for weight in (1e-6, 1.0):
        router = {"hidden_dim": 32, "key_dim": 16, "lora_rank": 4}
        fit(config=router_config(router=router, losses={"drift": weight}))
        (metrics,) = Path("runs/tiny").rglob("metrics.csv")
        drifts.append(column(metrics, "train/drift")[-1])
        shutil.rmtree("runs")
    free, kept = drifts
    assert 0 < kept < 0.2 * free


def test_of_the_usual_linears_a_base_need_not_have_all(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ("q_proj", "qkv_proj", "down_proj")
    monkeypatch.setattr(adapter_module, "USUAL_LINEARS", usual)
    training = AdapterTraining("x", base="tiny-random/llama", router_layer=1, rank=2, target_modules=usual)
    training.configure_model()
    assert {path.rpartition(".")[2] for path in training.stack.linears} == {"q_proj", "down_proj"}
    none = AdapterTraining("x", base="tiny-random/llama", router_layer=1, rank=2, target_modules=("qkv_proj",))
    with pytest.raises(ValueError, match="target_modules names qkv_proj"):
        none.configure_model()


def test_a_routers_checkpoint_of_other_settings_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    fit(*HALF, "--trainer.max_steps", "20", config=router_config())
    (checkpoint,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    for changes, words in (
        ({"router_layer": 0}, "router_layer, there 1 and here 0"),
        ({"router": {"hidden_dim": 32, "key_dim": 8}}, "router.key_dim, there 16 and here 8"),
        (
            {"adapters": ["adapters/digits", "adapters/letters"]},
            "adapters, there ['letters', 'digits'] and here ['digi",
        ),
    ):
        assert words in complaint(capsys, "--ckpt_path", str(checkpoint), config=router_config(**changes))


def test_an_adapters_checkpoint_of_other_settings_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    fit(*HALF, "--trainer.max_steps", "20")
    (path,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    words = "error: the checkpoint was made with other settings: it and what is trained here differ in "
    for name, value, difference in (
        ("rank", "8", "rank, there 4 and here 8. Resume with"),
        ("alpha", "16", "alpha, there 8.0 and here 16.0. Resume with"),
        ("target_modules", "[k_proj]", "target_modules, there ['down_proj', "),
    ):
        assert f"{words}{difference}" in complaint(
            capsys, "--ckpt_path", str(path), f"--model.init_args.{name}={value}"
        )
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["settings"]  # as older ones
    torch.save(checkpoint, "older.ckpt")
    assert f"{words}stack.values" in complaint(capsys, "--ckpt_path", "older.ckpt", "--model.init_args.rank=8")
    fit(*HALF, "--trainer.max_steps", "21", "--ckpt_path", "older.ckpt")


@pytest.mark.parametrize("kind", ["text", "pickle", "cut", "list", "nothing"])
def test_what_is_no_checkpoint_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("junk.ckpt")
    torch.save([1] if kind == "list" else {"state_dict": {"x": torch.zeros(999)}}, path)
    whole = path.read_bytes()
    contents = {"text": b"hello\n" * 99, "pickle": b"h\x05" * 99, "cut": whole[: len(whole) // 2], "nothing": b""}
    path.write_bytes(contents.get(kind, whole))
    error = complaint(capsys, "--ckpt_path", str(path))
    assert error.startswith("error: ")
    assert "junk.ckpt is no checkpoint of this training, or is damaged (" in error


def test_a_trained_lora_routes_as_it_did_in_training() -> None:
    fit("--trainer.max_steps", "10", config=router_config(router={"hidden_dim": 32, "key_dim": 16, "lora_rank": 4}))
    m = molora.load("bank", device="cpu", dtype="float32")
    training = RouterTraining(
        ["adapters/letters", "adapters/digits"],
        "other",
        base="tiny-random/llama",
        router=molora.RouterConfig(hidden_dim=32, key_dim=16, lora_rank=4),
        router_layer=1,
        dtype="float32",
    )
    training.configure_model()
    router, lora = m.decoder.router, training.lora
    assert isinstance(router, molora.KeyRouter)
    assert lora is not None
    training.router.load_state_dict(router.state_dict())
    with torch.no_grad():
        for (a_ERI, b_EOR), weights in zip(lora.pairs(), (router.lora[path] for path in lora.linears), strict=True):
            a_ERI.copy_(weights.a_RI)
            b_EOR.copy_(weights.b_OR)
    data = examples(read_records("configs/tiny.jsonl"), m.tokenizer, max_length=256)
    loader = PackedLoader(data, ["base"], row_length=256, rows=2, pad_id=0, mix=ActivationMix(), seed=0)
    batch = next(iter(loader))
    lora.act(batch.position_ids >= batch.start)
    request = RouteRequest(batch.start, auto=torch.ones_like(batch.input_ids, dtype=torch.bool))
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with torch.no_grad():
        wanted = training.decoder.router_input(**inputs)
        got = m.decoder.router_input(request, **inputs)
        without = m.decoder.router_input(**inputs)
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(without, wanted, atol=1e-2)


def test_keeping_rows_changes_nothing() -> None:
    fit("--trainer.max_steps", "12", config=router_config())
    kept = Path("kept")
    fit("--trainer.max_steps", "12", config=router_config(keep_rows=True, output=str(kept), bank_name="bank"))
    first, second = (Bank.open(path).load_router() for path in ("bank", kept))
    assert first is not None
    assert second is not None
    assert first.digest == second.digest


def test_the_router_learns_from_the_language_model_loss_alone() -> None:
    before = Path("adapters/letters/adapter_model.safetensors")
    config = router_config(losses={"label": 0.0, "lm": 1.0, "balance": 0.01, "z": 0.001})
    contents = before.read_bytes()
    fit("--trainer.max_steps", "10", config=config)
    state = Bank.open("bank").load_router().state_dict()  # type: ignore[union-attr]
    untrained = RouterTraining([], "x", router=molora.RouterConfig(hidden_dim=32, key_dim=16))
    assert any(value.abs().sum() > 0 for value in state.values())
    assert before.read_bytes() == contents  # the adapters are frozen
    assert untrained.losses.lm == 0


@pytest.mark.parametrize("make", [lambda: AdapterTraining("letters"), lambda: RouterTraining([], "bank")])
def test_the_base_is_loaded_where_the_trainer_will_train(make: Any) -> None:
    training = make()
    training.base = "tiny-random/llama"
    training._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    stop = patch("molora.training.frozen.load_base", side_effect=RuntimeError("stop"))
    with stop as loads, pytest.raises(RuntimeError, match="stop"):
        training.configure_model()
    assert loads.call_args.kwargs["device"] == torch.device("cuda", 0)


def router_training(**settings: Any) -> tuple[RouterTraining, Any]:
    """A training module over adapters like those of `router_config`, but stronger, and a batch."""
    router_config(alpha=100.0)
    training = RouterTraining(
        ["adapters/letters", "adapters/digits"],
        "bank",
        base="tiny-random/llama",
        router=molora.RouterConfig(hidden_dim=32, key_dim=16),
        router_layer=1,
        dtype="float32",
        **settings,
    )
    training.configure_model()
    data = examples(read_records("configs/tiny.jsonl"), training.tokenizer, max_length=256)
    domains = ["base", "letters", "digits"]
    loader = PackedLoader(data, domains, row_length=256, rows=2, pad_id=0, mix=ActivationMix(), seed=0)
    return training, next(iter(loader))


def test_the_routers_own_choice_acts_in_training_as_in_the_bank() -> None:
    training, batch = router_training(losses=RouterLosses(label=0.0, lm=1.0))
    training.write()
    m = molora.load("bank", device="cpu", dtype="float32")
    request = RouteRequest(batch.start, auto=torch.ones_like(batch.input_ids, dtype=torch.bool))
    with torch.no_grad():
        with training.decoder.requested(request):
            got = training.forward_hidden(batch)
            record = training.decoder.routes.record
        with m.decoder.requested(request):
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            wanted = m.model.get_decoder()(**inputs).last_hidden_state
        base = training.forward_hidden(batch)
    assert torch.allclose(got, wanted, atol=1e-3)
    assert not torch.allclose(got, base, atol=1e-1)
    assert record is not None
    assert len(record.slots.unique()) > 1  # somebody acts somewhere, and nobody elsewhere


def test_what_each_adapter_loses_is_the_loss_of_its_own_forward() -> None:
    training, batch = router_training(losses=RouterLosses(label=0.0, token=1.0))
    active = batch.position_ids >= batch.start
    got_NC = training._losses_of_each(batch, active)
    learned = (batch.targets != -100).flatten()
    wanted = []
    for name in ("base", "letters", "digits"):
        slot = ["base", "letters", "digits"].index(name) - 1
        slots = torch.full_like(batch.input_ids, slot)[..., None].int()
        request = RouteRequest(batch.start, slots=slots, gates=torch.ones(slots.shape))
        with training.decoder.requested(request), torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
            logits = training.model(**inputs).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        wanted.append(torch.where(learned, each, 0.0))
    wanted_NC = torch.stack(wanted, -1)
    relative = wanted_NC - wanted_NC.amin(-1, keepdim=True)
    assert torch.allclose(got_NC[learned], relative[learned], atol=1e-4)
    assert relative[learned].max() > 0.1
    # A question's tokens have the mean of their own conversation's answer.
    row, position = 0, int(batch.start[0, 0])
    ends = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
    end = ends[1] if len(ends) > 1 else batch.input_ids.shape[1]
    mean_C = wanted_NC.view(2, -1, 3)[row, :end].sum(0) / (batch.targets[row, :end] != -100).sum()
    assert torch.allclose(got_NC.view(2, -1, 3)[row, position], mean_C - mean_C.min(), atol=1e-4)
    assert not got_NC[~active.flatten() & ~learned].any()


def test_a_router_learns_from_each_adapters_losses() -> None:
    training, batch = router_training(losses=RouterLosses(label=0.0, token=1.0))
    optimizer = torch.optim.Adam(training.router.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = training._loss(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # of what base or an adapter loses beyond the best of them


def test_adapters_may_go_on_learning_with_their_router() -> None:
    config = router_config(losses={"given": 1.0}, adapter_lr=0.01)
    before = {name: weights(Path("adapters") / name) for name in ("letters", "digits")}
    fit("--trainer.max_steps", "30", config=config)
    bank = Bank.open("bank")
    for name, old in before.items():
        now = bank.load_adapter(name).tensors()
        assert now.keys() == old.keys()
        assert any(not torch.allclose(now[key], old[key], atol=1e-2) for key in old)
        assert all(torch.equal(weights(Path("adapters") / name)[key], old[key]) for key in old)
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    given = column(metrics, "train/given")
    assert given[-1] < 0.8 * given[0]
    whole = bank.config
    (checkpoint,) = Path("runs/tiny/checkpoints").glob("*step=20*.ckpt")
    shutil.rmtree("bank")
    fit("--trainer.max_steps", "30", "--ckpt_path", str(checkpoint), config=config)
    assert Bank.open("bank").config == whole


def test_router_inputs_are_the_hidden_states_of_the_unmodified_base() -> None:
    base = resolve_base("tiny-random/llama")
    model, tokenizer = molora.checkpoint.load_base(base, device="cpu")
    data = examples(read_records("configs/tiny.jsonl"), tokenizer, max_length=256)
    batch = next(iter(PackedLoader(data, [], row_length=256, rows=2, pad_id=0, mix=ActivationMix(), seed=0)))
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with torch.no_grad():
        wanted = model.model(**inputs, output_hidden_states=True).hidden_states[2]
    decoder = molora.injection.RoutedDecoder(model, [], num_slots=1, max_rank=1, router_layer=2)
    assert torch.equal(decoder.router_input(**inputs), wanted)
    assert torch.equal(model.model(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterLosses(label=0.0, lm=0.0), "above 0"),
        (lambda: RouterTraining([], "x", losses=RouterLosses(lm=1.0), keep_rows=True), "keep_rows"),
        (lambda: RouterTraining([], "x", losses=RouterLosses(given=1.0), keep_rows=True), "keep_rows"),
        (lambda: RouterTraining([], "x", router=molora.RouterConfig(lora_rank=4), keep_rows=True), "keep_rows"),
        (lambda: RouterTraining([], "x", router=molora.RouterConfig(lora_rank=4), router_layer=0), "layers below"),
        (lambda: RouterTraining([], "x", losses=RouterLosses(drift=1.0)), "lora_rank is 0"),
        (lambda: RouterLosses(lm=1.0, given=1.0), "set one of them to 0"),
        (lambda: RouterTraining([], "x", losses=RouterLosses(token=1.0), keep_rows=True), "keep_rows"),
        (lambda: RouterTraining([], "x", adapter_lr=0.1), "learn from losses.lm or losses.given"),
        (lambda: RouterTraining([], "x", adapter_lr=-1, losses=RouterLosses(given=1.0)), "a rate above 0"),
        (lambda: RouterTraining(["a/letters", "b/letters"], "x"), "share a name"),
        (lambda: RouterTraining([], "x", base="tiny-random/llama").configure_model(), "adapters names none"),
        (
            lambda: RouterTraining(
                [], "x", router=molora.RouterConfig(kind="token_ranges", ranges=((0, 9, "letters"),))
            ),
            "learns nothing",
        ),
        (lambda: AdapterTraining("base"), "no legal name"),
        (lambda: AdapterTraining("a", rank=0), r"^rank is 0; expected a whole number of 1 or more\.$"),
        (lambda: AdapterTraining("a", rank=-2), "^rank is -2"),
        (lambda: AdapterTraining(["a", "b"], rank={"a": 4, "b": 0}), "^rank is 0"),
        (lambda: AdapterTraining(["a", "b"], rank={"a": 4}), "^rank is given for 'a'; add one for 'b'"),
        (lambda: AdapterTraining(["a", "b"], alpha={"a": 4.0, "b": -1.0}), "^alpha is -1.0"),
        (lambda: AdapterTraining("a", alpha=0.0), "^alpha is 0.0; expected a number above 0"),
        (lambda: AdapterTraining("a", alpha=float("nan")), "^alpha is nan"),
        (lambda: AdapterTraining("a", router_layer=-1), "^router_layer is -1; expected a whole number of 0 or more"),
        (lambda: AdapterTraining("a", target_modules=()), "^target_modules is .*; expected a list"),
        (lambda: RouterTraining([], "x", router_layer=-1), "^router_layer is -1"),
        (lambda: RouterTraining([], "x", max_rank=0), "^max_rank is 0"),
        (lambda: Schedule(warmup_steps=-1), "^schedule.warmup_steps is -1"),
        (lambda: Schedule(lr=-1.0), "^schedule.lr is -1.0; expected a number of 0 or more"),
        (lambda: Schedule(lr=float("nan")), "^schedule.lr is nan"),
        (lambda: Schedule(weight_decay=-1.0), "^schedule.weight_decay is -1.0"),
        (lambda: ChatData("x", rows=0), "^data.rows is 0; expected a whole number of 1 or more"),
        (lambda: ChatData("x", rows=-1), "^data.rows is -1"),
        (lambda: ChatData("x", row_length=-5), "^data.row_length is -5"),
        (lambda: ChatData("x", max_records=-3), "^data.max_records is -3"),
        (lambda: ChatData("x", val_batches=-1), "^data.val_batches is -1; expected a whole number of 0 or more"),
        (lambda: Trainer(gradient_clip_val=-1), "^trainer.gradient_clip_val is -1; expected a number of 0 or more"),
        (lambda: Trainer(accumulate_grad_batches=0), "^trainer.accumulate_grad_batches is 0; expected"),
        (lambda: Trainer(accelerator="cpu", devices=0), r"Trainer\(devices=0\).* is not a valid input"),
    ],
)
def test_wrong_settings_are_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            ("--model.init_args.target_modules", "[q_proj, qq_proj]"),
            "target_modules names qq_proj; no linear from layer 1 on is so called; there are down_proj, gate_proj, ",
        ),
        (
            ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nope", "--trainer.max_steps=30"),
            "Early stopping conditioned on metric `val/nope` which is not available.",
        ),
        (("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=-1"), "every_n_train_steps"),
        (("--model.init_args.name", "../evil"), "error: '../evil' is no legal name: use letters, digits, '.', '_' and"),
        (("--model.init_args.rank", "0"), "error: rank is 0; expected a whole number of 1 or more."),
        (("--model.init_args.schedule.warmup_steps", "-1"), "error: schedule.warmup_steps is -1; expected a whole"),
        (("--trainer.devices", "0"), "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
    ],
)
def test_wrong_settings_are_one_line(extra: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, *extra)
    assert error.startswith("error: ")
    assert words in error
    assert "Union subtypes" not in error
    assert "Namespace" not in error


@pytest.mark.parametrize("root", [".", "root"])
def test_settings_are_saved_with_the_logs_or_nowhere(root: str) -> None:
    Path("root").mkdir()
    for folder in (".", "root"):
        Path(folder, "config.yaml").write_text("mine: true\n")
    fit("--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.default_root_dir", root)
    for folder in (".", "root"):
        assert Path(folder, "config.yaml").read_text() == "mine: true\n"
    fit("--trainer.max_steps", "1")
    (saved,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["max_steps"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "accelerator is not available" in complaint(capsys, "--trainer.accelerator", "cuda")


def test_an_unknown_setting_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit("--model.init_args.rnak", "4")
    assert "rnak" in capsys.readouterr().err


def test_every_config_begins_with_its_command() -> None:
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        others = {"serve.yaml": "python serve.py", "serve_ray.yaml": "python serve.py --ray"}
        others |= dict.fromkeys(("bank.yaml", "texts.yaml"), "molora train bank")
        command = others.get(path.name, "python train.py fit")
        assert path.read_text().splitlines()[0] == f"# {command} --config configs/{path.name}"
        assert json.dumps(yaml.safe_load(path.read_text()))


def test_the_stages_one_by_one_are_those_of_the_bank() -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())

    bank = read("bank")
    for stage, configs in (
        ("adapters", [f"adapter_{name}" for name in bank["adapters"]["domains"]]),
        ("router", ["router"]),
    ):
        for name in configs:
            own, whole = read(name), bank[stage]
            assert own["seed_everything"] == bank["seed"]
            assert whole["model"].items() <= own["model"]["init_args"].items(), name
            assert whole["data"].items() <= own["data"].items(), name
            assert whole["trainer"].items() <= own["trainer"].items(), name
            assert own["model"]["init_args"]["router_layer"] == bank["router_layer"]


@pytest.mark.parametrize(
    ("name", "train", "words"),
    [
        ('["letters", "digits"]', {"letters": "configs/tiny.jsonl"}, "data.train has sources by name, for ['letters']"),
        ("letters", {"words": "configs/tiny.jsonl"}, "for ['words']; expected them for each of ['letters']"),
        ('["letters", "letters"]', "configs/tiny.jsonl", "expected one name, or several different ones"),
        ("[]", "configs/tiny.jsonl", "expected one name, or several different ones"),
    ],
)
def test_names_that_do_not_fit_the_data_are_errors(
    name: str, train: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint(capsys, "--model.init_args.name", name, "--data.train", json.dumps(train))


def test_data_without_the_trained_domain_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, "--model.init_args.name", "sums")
    assert "no record has a domain among ['sums']; the data's are 'letters' (80), 'digits' (20)." in error


def test_other_domains_are_counted() -> None:
    single = '{"prompt": "x", "completion": "y"%s}\n'
    others = [', "domain": "digits"'] * 2 + [', "domain": "digitz"', ', "domain": null', ""]
    others += [f', "domain": "{domain}", "labels_only": true' for domain in ("digitz", "letters")]
    Path("mine.jsonl").write_text(Path("configs/tiny.jsonl").read_text() + "".join(single % each for each in others))
    few = ("--trainer.max_steps", "1", "--data.train", "mine.jsonl")
    words = (
        r"mine.jsonl: 6 of 87 records have other domains than letters: "
        r"'digits' \(2\), labels only \(2\), 'digitz' \(1\), 'base' \(1\)"
    )
    with pytest.warns(UserWarning, match=words):
        fit(*few)
    words = (
        r"mine.jsonl: 3 of 87 records have other domains than base, letters, digits: 'digitz' \(2\), no domain \(1\)"
    )
    with pytest.warns(UserWarning, match=words):
        fit(*few, config=router_config())


def test_an_adapter_without_records_is_named_to_its_router() -> None:
    lines = Path("configs/tiny.jsonl").read_text().splitlines(keepends=True)
    Path("mine.jsonl").write_text("".join(line for line in lines if "digits" not in line))
    few = ("--trainer.max_steps", "1", "--data.train", "mine.jsonl")
    with pytest.warns(UserWarning, match=r"mine.jsonl: no record has the domain 'digits', so nothing here teaches"):
        fit(*few, config=router_config())
    with warnings.catch_warnings(record=True) as told:
        fit(*few, config=router_config(losses={"label": 0.0, "lm": 1.0}))
    assert not [each for each in told if "no record has the domain" in str(each.message)]


def test_a_router_learns_from_labels_only() -> None:
    lines = [json.loads(line) for line in Path("configs/tiny.jsonl").read_text().splitlines()]
    Path("mine.jsonl").write_text("".join(json.dumps(line | {"labels_only": True}) + "\n" for line in lines))
    fit("--data.train", "mine.jsonl", config=router_config())
    (metrics,) = Path("runs/tiny").rglob("metrics.csv")
    assert column(metrics, "val/routed_right")[-1] > 0.8


def test_conversations_longer_than_the_models_context_are_left_out() -> None:
    base = resolve_base("tiny-random/llama")
    context = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    record = {"prompt": "a" * context, "completion": "b", "domain": "letters"}
    Path("mine.jsonl").write_text(Path("configs/tiny.jsonl").read_text() + json.dumps(record) + "\n")
    with pytest.warns(UserWarning, match=f"1 of 81 records are left out: 1 longer than {context} tokens"):
        fit("--trainer.max_steps=1", "--data.train=mine.jsonl", f"--data.row_length={2 * context}", "--data.rows=1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "mine.jsonl: record 1: message 0 (user) has conte"),
        ('{"prompt": "x"}', "mine.jsonl: record 1: a record needs 'messages', or 'prompt' and 'completion'"),
        ('{"prompt": "x", "completion": " "}', "mine.jsonl: 1 of 1 records are left out: 1 with an empty answer"),
        ('{"prompt": ', "mine.jsonl, line 1: not valid JSON"),
        ("", "mine.jsonl has no records"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_data_is_one_line(split: str, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.jsonl").write_text(line)
    assert complaint(capsys, f"--data.{split}", "mine.jsonl").startswith(f"error: {words}")


def test_a_folder_that_is_no_bank_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no bank"):
        RouterTraining([], str(tmp_path / "precious"))


def test_a_bank_that_is_replaced_keeps_its_card() -> None:
    config = router_config()
    Path("bank").mkdir()
    Path("bank/molora.json").write_text("{}")
    Path("bank/README.md").write_text("card")
    fit("--trainer.max_steps", "2", config=config)
    assert Bank.open("bank").has_router
    assert Path("bank/README.md").read_text() == "card"


def test_training_without_an_end_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "set trainer.max_steps" in complaint(capsys, "--trainer.max_steps", "-1", "--trainer.max_epochs", "1")


def test_epochs_of_limited_batches_go_on_where_the_last_one_stopped() -> None:
    fit("--trainer.max_steps", "6", "--model.init_args.output_dir", "whole")
    limits = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "3", "--trainer.val_check_interval", "2"]
    fit("--trainer.max_steps", "6", *limits, "--model.init_args.output_dir", "parts")
    for key, tensor in weights(Path("whole/letters")).items():
        assert torch.equal(tensor, weights(Path("parts/letters"))[key]), key
