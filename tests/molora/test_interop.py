"""Adapters of PEFT's and X-LoRA's in a bank, with PEFT as the oracle, and a bank's for vLLM, by its rules."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import molora
from molora import Adapter, Bank
from molora.cli import app
from molora.interop import export_for_vllm, import_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [61, 62, 63]
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.2\..*up_proj": 6},
        "alpha_pattern": {"self_attn.o_proj": 3, r"model\.layers\.3\.mlp\.up_proj": 40},
    },
    "invoked": {"target_modules": ["q_proj", "down_proj"], "alora_invocation_tokens": INVOCATION},
}


@pytest.fixture
def write(base_model, tmp_path) -> Callable[..., Any]:
    """A model of PEFT's with one random LoRA, whose folder it writes."""

    def to(folder: Path, *, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        config = LoraConfig(**settings | options)
        model = get_peft_model(base_model(), config).eval()
        make_random(model)
        model.save_pretrained(folder)
        return model

    return to


@pytest.fixture
def write_xlora(write, base_model, tmp_path) -> Callable[..., Path]:
    """A checkpoint as PEFT's X-LoRA saves it, over the folders `loras/a` and `loras/b`."""

    def to(folder: Path, *, layers: list[int] | None = None, change: float = 0, **options: Any) -> Path:
        loras = {name: tmp_path / "loras" / name for name in "ab"}
        for seed, lora in enumerate(loras.values()):
            write(lora, seed=seed, layers_to_transform=layers, lora_dropout=0.1)
        base = base_model()
        base.config.use_cache = False
        adapters = {name: str(lora) for name, lora in loras.items()}
        config = XLoraConfig(hidden_size=64, task_type="CAUSAL_LM", adapters=adapters, **options)
        model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_A." in parameter_name:
                parameter.data += change
        model.save_pretrained(folder)
        return folder

    return to


@pytest.fixture
def bank(make_bank, tmp_path) -> Bank:
    """An empty one."""
    return make_bank(tmp_path, adapters={})


def make_random(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestImport:
    def test_a_folder_of_many_makes_a_bank_that_gives_pefts_logits(self, write, base_dir, tmp_path, random_ids):
        source, path = tmp_path / "given", tmp_path / "made"
        models = {name: write(source / name, seed=seed, **LORAS[name]) for seed, name in enumerate(sorted(LORAS))}
        (source / "notes").mkdir()
        done = import_adapters(path, source)
        assert done.is_new
        assert done.left_out == ()
        config = Bank.open(path).config
        assert config == done.bank.config
        assert (config.name, config.base.name) == ("made", str(base_dir()))
        assert (config.router_layer, config.max_rank) == (0, 6)
        policies = {entry.name: entry.activation for entry in done.entries}
        assert policies == {"invoked": "invocation", "patterns": 0, "plain": 0, "rslora": 0}
        assert list(policies) == sorted(LORAS)
        m = molora.load(path, device="cpu", dtype="float32")
        ids = [*[i for i in random_ids(9) if i not in INVOCATION], *INVOCATION, 70, 71]
        starts = {name: 0 for name in LORAS} | {"invoked": len(ids) - 5}
        for name, model in models.items():
            assert close(m.logits([ids], [starts[name]], route=name)[0], logits(model, ids)), name
            assert not torch.allclose(logits(model, ids), m.model(torch.tensor([ids])).logits, atol=0.1)

    def test_all_that_one_peft_model_saves(self, write, bank, tmp_path, random_ids):
        model = write(tmp_path / "one")
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"]))
        make_random(model)
        model.save_pretrained(tmp_path / "several")
        done = import_adapters(bank.path, tmp_path / "several", activation="turn")
        assert not done.is_new
        assert [(entry.name, entry.activation) for entry in done.entries] == [("several", "turn"), ("second", "turn")]
        m = molora.load(bank.path, device="cpu", dtype="float32")
        for theirs, ours in (("default", "several"), ("second", "second")):
            model.set_adapter(theirs)
            assert close(m.logits([random_ids(12)], [0], route=ours)[0], logits(model, random_ids(12)))

    def test_one_folder_by_another_name(self, write, bank, tmp_path):
        write(tmp_path / "given" / "a", lora_dropout=0.1)
        result = call(
            "bank", "import", bank.path, tmp_path / "given" / "a", "--name", "law", "--activation", "response"
        )
        assert result.exit_code == 0, result.output
        added, dropped = result.stdout.splitlines()
        assert added.startswith("added law (explicit routes only, activation response, ")
        assert dropped == "left out: lora_dropout of law: it acts in training only"
        assert Bank.open(bank.path).load_adapter("law").digest == Adapter.read(tmp_path / "given" / "a").digest

    def test_what_a_trainer_saved_on_the_way_is_left_out(self, make_adapter, bank, tmp_path):
        make_adapter(seed=5).write(tmp_path / "out")
        make_adapter(seed=6).write(tmp_path / "out" / "checkpoint-50")
        done = import_adapters(bank.path, tmp_path / "out", name="late")
        assert [entry.name for entry in done.entries] == ["late"]
        assert done.left_out == ("checkpoint-50: what a Trainer had learned earlier",)

    def test_a_new_bank_by_command(self, make_adapter, base_dir, tmp_path):
        for name in "ab":
            make_adapter().write(tmp_path / "given" / name)
        command = ["bank", "import", tmp_path / "made", tmp_path / "given"]
        assert "no adapter names its base model; give it (--base)" in call(*command).stderr
        result = call(*command, "--base", base_dir(), "--router-layer", 2)
        assert result.exit_code == 0, result.output
        made, *added = result.stdout.splitlines()
        assert made == f"made {tmp_path / 'made'} (base {base_dir()}, router layer 2, maximum rank 4)"
        assert [line.split()[:2] for line in added] == [["added", "a"], ["added", "b"]]
        assert "explicit routes only" in added[0], "it acts in layer 1"

    def test_every_adapter_is_routable_from_the_first_layer_that_one_acts_in(self, make_adapter, base_dir, tmp_path):
        for first_layer in (2, 3):
            make_adapter(first_layer=first_layer).write(tmp_path / "given" / str(first_layer))
        done = import_adapters(tmp_path / "made", tmp_path / "given", base=str(base_dir()))
        assert done.bank.config.router_layer == 2
        assert all(entry.routable for entry in done.entries)


class TestXLora:
    def test_its_adapters_are_the_folders_that_it_names(self, write_xlora, bank, tmp_path, random_ids, base_model):
        write_xlora(tmp_path / "xlora", global_scaling_weight=2.0)
        result = call("bank", "import", bank.path, tmp_path / "xlora")
        assert result.exit_code == 0, result.output
        first, second, *left_out = result.stdout.splitlines()
        assert (first.split()[1], second.split()[1]) == ("a", "b")
        assert len(left_out) == 3
        for line, word in zip(
            left_out, ("classifier", "global_scaling_weight 2.0", "lora_dropout of a, b"), strict=True
        ):
            assert line.startswith("left out: ")
            assert word in line
        m = molora.load(bank.path, device="cpu", dtype="float32")
        for name in "ab":
            theirs = PeftModel.from_pretrained(base_model(), tmp_path / "loras" / name).eval()
            assert close(m.logits([random_ids(12)], [0], route=name)[0], logits(theirs, random_ids(12)))

    @pytest.mark.parametrize("options", [{}, {"use_trainable_adapters": True}])
    def test_what_it_saved_is_taken_where_that_is_whole(self, write_xlora, bank, tmp_path, options):
        """Here the adapters were trained with the classifier, or what they came from is gone."""
        change = 0.5 if options else 0
        write_xlora(tmp_path / "xlora", layers=[2, 3], change=change, **options)
        given = {name: Adapter.read(tmp_path / "loras" / name) for name in "ab"}
        if not options:
            (tmp_path / "loras").rename(tmp_path / "elsewhere")
        import_adapters(bank.path, tmp_path / "xlora")
        for name, adapter in given.items():
            ours = Bank.open(bank.path).load_adapter(name)
            assert set(ours.weights) == set(adapter.weights)
            for module, pair in adapter.weights.items():
                assert torch.equal(ours.weights[module].a_RI, pair.a_RI + change)
                assert torch.equal(ours.weights[module].b_OR, pair.b_OR)
                assert ours.weights[module].scaling == pair.scaling

    def test_layers_that_peft_dropped_when_it_saved_are_missed(self, write_xlora, bank, tmp_path):
        write_xlora(tmp_path / "xlora", use_trainable_adapters=True)
        before = contents(bank.path)
        error = call("bank", "import", bank.path, tmp_path / "xlora").stderr
        assert f"{tmp_path / 'xlora' / '0'} lacks layers 1: PEFT took their numbers" in error
        assert contents(bank.path) == before

    def test_folders_of_their_names_come_first(self, write_xlora, bank, tmp_path):
        """As in the checkpoints that X-LoRA's authors published."""
        source = write_xlora(tmp_path / "xlora")
        for name in "ab":
            (tmp_path / "loras" / name).rename(source / name)
        edit(source, adapters={"a": "owner/model", "b": "owner/model"})
        assert [entry.name for entry in import_adapters(bank.path, source).entries] == ["a", "b"]

    def test_a_checkpoint_from_before_it_was_part_of_peft(self, make_adapter, bank, tmp_path):
        make_adapter().write(tmp_path / "xlora" / "adapter_1")
        save_file({"a": torch.zeros(1)}, tmp_path / "xlora" / "xlora_classifier.safetensors")
        done = import_adapters(bank.path, tmp_path / "xlora")
        assert [entry.name for entry in done.entries] == ["adapter_1"]
        assert [line.startswith("X-LoRA's classifier") for line in done.left_out] == [True]

    def test_an_adapter_that_is_nowhere(self, write_xlora, bank, tmp_path):
        source = write_xlora(tmp_path / "xlora")
        edit(source, adapters={"a": str(tmp_path / "loras" / "a"), "b": "b", "c": "owner/model"})
        with pytest.raises(ValueError, match=r"xlora/1 lacks layers 0: PEFT took"):
            import_adapters(bank.path, source)
        edit(source, adapters={"a": str(tmp_path / "loras" / "a"), "b": str(tmp_path / "loras" / "b"), "c": "owner/c"})
        with pytest.raises(FileNotFoundError, match=r"its adapter 'c' is neither in .*xlora/c nor in owner/c nor in"):
            import_adapters(bank.path, source)
        edit(source, adapters=["a", "b"])
        with pytest.raises(ValueError, match=r"field 'adapters' is .*; expected names and folders"):
            import_adapters(bank.path, source)


class TestAllOrNone:
    """The last of three adapters is wrong: the bank stays as it was, and none is made."""

    @pytest.fixture
    def source(self, make_adapter, tmp_path) -> Path:
        for seed, name in enumerate("abc"):
            make_adapter(seed=seed).write(tmp_path / "given" / name)
        return tmp_path / "given"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda folder: edit(folder, use_dora=True), "c/adapter_config.json: field 'use_dora' is True"),
            (
                lambda folder: edit(folder, modules_to_save=["lm_head"]),
                "c/adapter_config.json: field 'modules_to_save'",
            ),
            (lambda folder: edit(folder, peft_type="IA3"), "c/adapter_config.json: peft_type is 'IA3'"),
            (lambda folder: edit(folder, peft_type="XLORA"), "c/adapter_config.json: peft_type is 'XLORA'"),
            (lambda folder: edit(folder, r=16), "c/adapter_model.safetensors: module"),
            (lambda folder: (folder / "adapter_model.safetensors").unlink(), "c/adapter_model.safetensors does not"),
            (lambda folder: folder.rename(folder.with_name("x y")), "'x y' is no legal name"),
        ],
    )
    def test_one_that_cannot_be_read(self, bank, source, tmp_path, base_dir, wrong, message):
        wrong(source / "c")
        before = contents(tmp_path)
        for path, options in ((bank.path, []), (tmp_path / "new", ["--base", base_dir()])):
            result = call("bank", "import", path, source, *options)
            assert result.exit_code == 2
            assert result.stdout == ""
            assert result.stderr.count("\n") == 1
            assert message in result.stderr
            assert str(source) in result.stderr
        assert contents(tmp_path) == before

    def test_one_that_cannot_be_written(self, bank, source, tmp_path, base_dir, monkeypatch):
        before, write = contents(tmp_path), Adapter.write

        def fail(adapter: Adapter, folder: Path) -> None:
            if folder.name == "c":
                raise OSError("disk full")
            write(adapter, folder)

        monkeypatch.setattr(Adapter, "write", fail)
        for path, options in ((bank.path, {}), (tmp_path / "new", {"base": str(base_dir())})):
            with pytest.raises(OSError, match="disk full"):
                import_adapters(path, source, **options)
        assert contents(tmp_path) == before

    def test_one_that_does_not_fit_the_bank(self, bank, source, make_adapter, tmp_path):
        empty = contents(bank.path)
        import_adapters(bank.path, source / "c")
        before = contents(bank.path)
        with pytest.raises(ValueError, match=rf"{source}: the bank has an adapter 'c' already; remove it first"):
            import_adapters(bank.path, source)
        assert contents(bank.path) == before
        Bank.open(bank.path).remove("c")
        make_adapter(rank=9).write(source / "c")
        with pytest.raises(ValueError, match=rf"{source}: adapter 'c' has rank 9; the bank's slots hold at most 8"):
            import_adapters(bank.path, source)
        assert contents(bank.path) == empty

    def test_bases_that_differ(self, bank, source, tmp_path, base_dir):
        for name, base in (("a", None), ("b", "owner/one"), ("c", "owner/two")):
            edit(source / name, base_model_name_or_path=base)
        before = contents(tmp_path)
        for options in ({}, {"base": str(base_dir())}):
            with pytest.raises(
                ValueError, match=r"given/b was made for the base 'owner/one', and .*/c for 'owner/two'"
            ):
                import_adapters(tmp_path / "new", source, **options)
        with pytest.raises(ValueError, match=r"given/b was made for the base 'owner/one', and .*/c for 'owner/two'"):
            import_adapters(bank.path, source)
        edit(source / "c", base_model_name_or_path="owner/one")
        with pytest.raises(ValueError, match=rf"{source}: adapter 'b' was made for the base model 'owner/one'"):
            import_adapters(tmp_path / "new", source, base="owner/three")
        after = contents(tmp_path)
        assert {path for path in before if before[path] != after[path]} == {"given/c/adapter_config.json"}

    def test_what_is_no_source_or_no_bank(self, bank, source, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty holds no adapter: neither it nor a folder in it"):
            import_adapters(bank.path, tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
            import_adapters(bank.path, tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="empty is not a bank"):
            import_adapters(tmp_path / "empty", source)
        with pytest.raises(ValueError, match="given holds 3 adapters, and one name cannot be for all"):
            import_adapters(bank.path, source, name="one")
        with pytest.raises(ValueError, match="bank exists already, with a base and a router layer; give neither"):
            import_adapters(bank.path, source, router_layer=1)
        (source / "a").rename(source / "given")
        Adapter.read(source / "b").write(source)
        with pytest.raises(ValueError, match="two adapters would be 'given'"):
            import_adapters(bank.path, source)


def vllm_scaling(folder: Path, *, max_lora_rank: int) -> float:
    """Load a folder as vLLM does, by rules that are written down here; the scaling of all its modules.

    vllm/lora/peft_helper.py (PEFTHelper): the fields that it requires and refuses, and the scaling. Older releases
    know neither rank_pattern nor alpha_pattern nor alora_invocation_tokens and ignore them; newer ones refuse the last.
    vllm/lora/utils.py (parse_fine_tuned_lora_name) and vllm/lora/lora_model.py (from_local_checkpoint): tensor names.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert 0 < config["r"] <= max_lora_rank
    assert config.get("bias", "none") == "none"
    for refused in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "use_bdlora", "use_qalora"):
        assert not config.get(refused), refused
    for ignored in ("rank_pattern", "alpha_pattern", "alora_invocation_tokens"):
        assert not config.get(ignored), ignored
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.")
        *module, side, weight = name.split(".")
        assert weight == "weight"
        assert module[-1] in LINEARS
        assert side in ("lora_A", "lora_B")
        assert tensor.shape[side == "lora_B"] == config["r"]
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


class TestExport:
    @pytest.mark.parametrize("name", LORAS)
    def test_vllm_and_peft_load_it_and_it_acts_from_the_first_token(
        self, write, bank, base_model, base_dir, tmp_path, random_ids, name
    ):
        write(tmp_path / name, **LORAS[name])
        bank.add(tmp_path / name)
        done = export_for_vllm(bank, tmp_path / "out")
        folder = tmp_path / "out" / name
        assert sorted(contents(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
        serve, model, *options = shlex.split(done.command)[1:]
        assert (serve, model) == ("serve", str(base_dir()))
        assert options == ["--enable-lora", "--lora-modules", f"{name}={folder}", "--max-lora-rank", "8"]
        scaling = vllm_scaling(folder, max_lora_rank=8)
        given, written = bank.load_adapter(name), Adapter.read(folder)
        assert set(given.weights) == set(written.weights)
        for module, pair in given.weights.items():
            new = written.weights[module]
            assert torch.allclose(scaling * new.b_OR @ new.a_RI, pair.scaling * pair.b_OR @ pair.a_RI, atol=1e-6)
        m = molora.load(bank, device="cpu", dtype="float32")
        theirs = PeftModel.from_pretrained(base_model(), folder).eval()
        ids = [*random_ids(9), *INVOCATION, 70, 71]
        assert close(logits(theirs, ids), m.logits([ids], [0], route=name)[0])
        assert any("activation (invocation of invoked)" in note for note in done.notes) == (name == "invoked")
        assert any(f"ranks and scalings of {name}" in note for note in done.notes) == (name == "patterns")

    @pytest.mark.parametrize("name", LORAS)
    def test_vllms_own_loader_gives_the_same_weights(self, write, bank, tmp_path, monkeypatch, name):
        """Where vLLM is installed, which needs a GPU's torch; last with 0.33.0, of which this part needs none."""
        vllm = pytest.importorskip("vllm.lora.lora_model")
        from vllm.config.lora import LoRAConfig
        from vllm.lora.peft_helper import PEFTHelper

        monkeypatch.setattr(vllm, "PIN_MEMORY", False)  # which needs a GPU

        write(tmp_path / name, **LORAS[name])
        bank.add(tmp_path / name)
        export_for_vllm(bank, tmp_path / "out")
        helper = PEFTHelper.from_local_dir(str(tmp_path / "out" / name), 2048)
        helper.validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
        loaded = vllm.LoRAModel.from_local_checkpoint(
            str(tmp_path / "out" / name), set(LINEARS), helper, lora_model_id=1, device="cpu", dtype=torch.float32
        )
        given = bank.load_adapter(name).weights
        assert loaded.loras.keys() == given.keys()
        for module, pair in given.items():
            theirs = loaded.loras[module]
            product = theirs.scaling * theirs.lora_b @ theirs.lora_a
            assert torch.allclose(product, pair.scaling * pair.b_OR @ pair.a_RI, atol=1e-6)

    def test_weights_that_need_no_change_are_written_as_they_are(self, make_adapter, bank, tmp_path):
        adapter = make_adapter()
        tensors = {key: tensor.bfloat16() for key, tensor in adapter.tensors().items()}
        adapter = Adapter.from_tensors(replace(adapter.config, use_rslora=True, r=4, lora_alpha=5), tensors)
        adapter.write(tmp_path / "x")
        bank.add(tmp_path / "x")
        export_for_vllm(bank, tmp_path / "out")
        assert (
            contents(tmp_path / "out/x")["adapter_model.safetensors"]
            == contents(tmp_path / "x")["adapter_model.safetensors"]
        )
        assert vllm_scaling(tmp_path / "out" / "x", max_lora_rank=8) == 5 / 2

    def test_what_is_lost_is_said(self, make_bank, key_router, make_adapter, base_dir, tmp_path):
        adapters = {"x": make_adapter(seed=1), "y": make_adapter(seed=2, rank=3), "z": make_adapter(rank=1)}
        adapters["y"] = replace(adapters["y"], config=replace(adapters["y"].config, base_model_name_or_path="a/b"))
        bank = make_bank(tmp_path, adapters=adapters, router=key_router(num_columns=4))
        before = contents(bank.path)
        result = call(
            "bank", "export", bank.path, tmp_path / "my out", "--for", "vllm", "--adapter", "y", "--adapter", "x"
        )
        assert result.exit_code == 0, result.output
        activation, router, base, unchecked, command = result.stdout.splitlines()
        assert activation.startswith("lost: activation (turn of y, x): in vLLM an adapter acts from the first token")
        assert router.startswith("lost: the router and blends: ")
        assert base == f"changed: the base that y names, from a/b to the bank's {base_dir()}"
        assert unchecked == f"not checked by vLLM: that the base is the bank's, with digest {bank.config.base.digest}"
        modules = [f"{name}={tmp_path / 'my out' / name}" for name in "yx"]
        assert shlex.split(command)[3:] == ["--enable-lora", "--lora-modules", *modules, "--max-lora-rank", "8"]
        assert sorted(path.name for path in (tmp_path / "my out").iterdir()) == ["x", "y"]
        assert Adapter.read(tmp_path / "my out" / "y").config.base_model_name_or_path == str(base_dir())
        assert contents(bank.path) == before
        assert export_for_vllm(bank, tmp_path / "z", ["z"]).command.endswith("--max-lora-rank 1")

    def test_what_cannot_be_exported(self, bank, make_adapter, tmp_path):
        def fails(*arguments: object) -> str:
            result = call("bank", "export", bank.path, tmp_path / "out", *arguments)
            assert result.exit_code == 2
            return result.stderr

        assert "the bank 'tiny' has no adapters" in fails("--for", "vllm")
        make_adapter().write(tmp_path / "x")
        Bank.open(bank.path).add(tmp_path / "x")
        assert "has no adapter 'law'" in fails("--for", "vllm", "--adapter", "law")
        assert "--for" in fails()
        assert "'sglang'" in fails("--for", "sglang")
        (tmp_path / "out").mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / "out" / "mine.safetensors")
        before = contents(tmp_path)
        assert "out is not empty; remove it or choose another folder" in fails("--for", "vllm")
        assert contents(tmp_path) == before
        (tmp_path / "out" / "mine.safetensors").unlink()
        assert call("bank", "export", bank.path, tmp_path / "out", "--for", "vllm").exit_code == 0

    def test_a_rank_that_vllm_does_not_take(self, make_adapter, base_dir, tmp_path):
        make_adapter(rank=513, first_layer=3).write(tmp_path / "x")
        bank = import_adapters(tmp_path / "wide", tmp_path / "x", base=str(base_dir())).bank
        with pytest.raises(ValueError, match="adapter 'x' has rank 513; vLLM takes at most 512"):
            export_for_vllm(bank, tmp_path / "out")
        assert not (tmp_path / "out").exists()
