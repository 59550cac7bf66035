import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import molora
from molora import Adapter, Bank, BaseInfo, KeyRouter, RouterConfig, TokenRangeRouter
from molora import bank as bank_module
from molora.adapter import random_adapter

KEYS = RouterConfig(hidden_dim=32, key_dim=16)


@pytest.fixture(scope="module")
def template(make_bank, key_router, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_bank(folder, router=key_router(KEYS))
    return folder


@pytest.fixture
def bank(template, tmp_path) -> Bank:
    """Adapters "x" and "y", and a router with random keys."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Bank.open(tmp_path / "bank")


@pytest.fixture
def write(make_adapter, tmp_path) -> Callable[..., Path]:
    """A PEFT folder of that name."""

    def to(name: str, **options) -> Path:
        make_adapter(**options).write(tmp_path / "given" / name)
        return tmp_path / "given" / name

    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(bank: Bank, change: Callable[[dict], object]) -> None:
    file = bank.path / "molora.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def test_a_bank_reads_as_it_was_written(bank):
    again = Bank.open(bank.path)
    assert again.config == bank.config
    assert [entry.name for entry in again.adapters] == ["x", "y"]
    assert (len(again), "x" in again, "z" in again, again.has_router) == (2, True, False, True)
    assert again.load_adapter("y").digest == again["y"].digest
    assert again.load_router().digest == bank.load_router().digest == again.config.router.digest
    assert sorted(contents(bank.path)) == [
        "adapters/x/adapter_config.json",
        "adapters/x/adapter_model.safetensors",
        "adapters/y/adapter_config.json",
        "adapters/y/adapter_model.safetensors",
        "molora.json",
        "router.safetensors",
    ]


def test_other_files_of_the_folder_are_kept(bank, write):
    (bank.path / "README.md").write_text("a card")
    (bank.path / "figures").mkdir()
    (bank.path / "figures" / "a.txt").write_text("1")
    bank.add(write("z"))
    assert (bank.path / "README.md").read_text() == "a card"
    assert (bank.path / "figures" / "a.txt").read_text() == "1"


def test_add_names_and_policies(bank, write, make_adapter, tmp_path):
    assert bank.add(write("z")).activation == 0
    invoked = make_adapter(seed=5)
    replace(invoked, config=replace(invoked.config, alora_invocation_tokens=[7, 8])).write(tmp_path / "given" / "a")
    assert bank.add(tmp_path / "given" / "a", name="b").activation == "invocation"
    assert bank.add(tmp_path / "given" / "a", name="c", activation="response").activation == "response"
    assert [entry.name for entry in Bank.open(bank.path).adapters] == ["x", "y", "z", "b", "c"]
    assert [entry.name for entry in bank.routable] == ["x", "y"], "the router has no keys for the others"
    with pytest.raises(ValueError, match="has an adapter 'z' already; remove it first"):
        bank.add(tmp_path / "given" / "z")
    with pytest.raises(ValueError, match="activation 'sometimes' is unknown; expected one of invocation, response"):
        bank.add(tmp_path / "given" / "z", name="d", activation="sometimes")


def test_several_are_added_at_once(bank, make_adapter):
    old = bank.load_router()
    keys = {"b": torch.full((16,), 2.0), "a": torch.full((16,), 1.0)}
    given = {name: make_adapter(seed=seed) for seed, name in enumerate("bca", start=5)}
    added = bank.add_all(given, activation="turn", keys=keys)
    assert [(entry.name, entry.routable) for entry in added] == [("b", True), ("c", False), ("a", True)]
    assert bank.adapters[2:] == added
    assert all(bank.load_adapter(name).digest == adapter.digest for name, adapter in given.items())
    assert torch.equal(bank.load_router().keys_CD, torch.stack([*old.keys_CD, keys["b"], keys["a"]]))
    before = contents(bank.path)
    with pytest.raises(ValueError, match="has an adapter 'x' already"):
        bank.add_all({"d": given["a"], "x": given["b"]})
    assert contents(bank.path) == before


def test_replacing_an_adapter_changes_its_digest_and_its_routes(bank, write):
    before, explicit, learned = bank["y"].digest, bank.route_digest([("y", 1.0)]), bank.route_digest(None)
    router = bank.load_router()
    key_D = router.keys_CD[2].clone()
    bank.remove("y")
    bank.add(write("y", seed=7), activation="turn", key=key_D)
    assert bank["y"].digest != before
    assert bank.route_digest([("y", 1.0)]) != explicit
    assert bank.load_router().digest == router.digest
    assert bank.route_digest(None) != learned
    bank.remove("y")
    bank.add(bank.path.parent / "adapters" / "y", name="renamed", key=key_D)
    assert bank["renamed"].digest == before
    assert bank.route_digest([("renamed", 1.0)]) == explicit, "a name is no content"
    assert bank.route_digest(None) == learned


def test_a_route_digest_is_of_adapters_and_weights(bank):
    pairs = [("x", 0.5), ("y", 0.25)]
    digests = {
        bank.route_digest(pairs),
        bank.route_digest([("x", 0.25), ("y", 0.5)]),
        bank.route_digest([("x", 0.5)]),
        bank.route_digest([("x", 1.0)]),
        bank.route_digest(None),
    }
    assert len(digests) == 5
    assert bank.route_digest(pairs[::-1]) == bank.route_digest(pairs)


def test_a_key_is_appended_or_removed_and_other_scores_stay(bank, write):
    h_TH = torch.randn(9, 64)
    scores = bank.load_router().scores(h_TH)
    bank.add(write("z", seed=3), key=torch.ones(16))
    with_z = bank.load_router().scores(h_TH)
    assert torch.allclose(with_z[:, :3], scores, atol=1e-6)
    assert [entry.name for entry in bank.routable] == ["x", "y", "z"]
    bank.remove("x")  # in the middle: the columns behind it move up
    without_x = Bank.open(bank.path).load_router().scores(h_TH)
    assert torch.allclose(without_x, with_z[:, [0, 2, 3]], atol=1e-6)
    assert [entry.name for entry in bank.routable] == ["y", "z"]
    bank.add(write("x2", seed=4))  # explicit only
    bank.remove("x2")
    assert torch.equal(bank.load_router().scores(h_TH), without_x)


def test_columns_reach_the_right_slots_after_a_removal(make_bank, make_adapter, key_router, tmp_path, random_ids):
    """Explicit-only adapters and removed ones shift slots against columns."""
    adapters = {name: make_adapter(seed=i) for i, name in enumerate("abc")}
    bank = make_bank(tmp_path, adapters={"low": make_adapter(seed=9, first_layer=0), **adapters})
    bank.set_router(key_router(KEYS, num_columns=4))
    before = molora.load(bank, device="cpu", dtype="float32")
    _, routes = before.logits([random_ids(60)], [0])
    bank.remove("b")
    after = molora.load(Bank.open(bank.path), device="cpu", dtype="float32")
    _, fewer = after.logits([random_ids(60)], [0])
    assert {name for route in routes[0] for name, _ in route} == {"a", "b", "c"}
    assert all(new == old for new, old in zip(fewer[0], routes[0], strict=True) if old != (("b", 1.0),))
    assert {name for route in fewer[0] for name, _ in route} == {"a", "c"}


class TestKeys:
    def test_a_key_of_another_size(self, bank, write):
        with pytest.raises(ValueError, match=r"a key of this router has shape \(16,\), not \(3,\)"):
            bank.add(write("z"), key=torch.ones(3))

    def test_routable_without_a_key(self, bank, write):
        with pytest.raises(ValueError, match="router has no key for 'z'; pass one"):
            bank.add(write("z"), routable=True)

    def test_a_key_that_nobody_would_use(self, bank, make_bank, write, tmp_path):
        with pytest.raises(ValueError, match="'z' is given a key and routable=False"):
            bank.add(write("z"), routable=False, key=torch.ones(16))
        with pytest.raises(ValueError, match="acts in layer 0, below the router layer 1"):
            bank.add(write("low", first_layer=0), key=torch.ones(16))
        bank.set_router(None)
        with pytest.raises(ValueError, match="'z' is given a key, but the bank has no router with keys"):
            bank.add(write("z"), key=torch.ones(16))
        bank.set_router(TokenRangeRouter(RouterConfig(kind="token_ranges", ranges=((0, 9, "x"),)), ["x", "y"]))
        with pytest.raises(ValueError, match="'z' is given a key, but the bank has no router with keys"):
            bank.add(write("z"), key=torch.ones(16))

    def test_a_router_of_another_number_of_columns(self, bank, key_router):
        with pytest.raises(ValueError, match=r"the router has 4 columns; the bank needs 3 \(base, x, y\)"):
            bank.set_router(key_router(KEYS, num_columns=4))


def test_a_routers_own_lora_is_part_of_it(make_bank, make_adapter, key_router, tmp_path):
    config = replace(KEYS, lora_rank=4)
    bank = make_bank(tmp_path, router=key_router(config))
    router = bank.load_router()
    assert router.lora
    assert RouterConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    make_adapter(seed=3).write(tmp_path / "z")
    bank.add(tmp_path / "z", key=router.keys_CD[1].clone())
    bank.remove("z")
    again = Bank.open(bank.path).load_router()
    assert again.digest == router.digest
    for path, weights in router.lora.items():
        assert torch.equal(again.lora[path].a_RI, weights.a_RI)
        assert torch.equal(again.lora[path].b_OR, weights.b_OR)
        assert again.lora[path].scaling == weights.scaling == 4
    path = next(iter(router.lora))
    again.lora[path] = replace(again.lora[path], a_RI=again.lora[path].a_RI + 1)
    assert again.digest != router.digest, "its blocks would be mistaken for the other's"
    for rank in (0, 8):
        raw = json.loads((bank.path / "molora.json").read_text())
        raw["router"]["config"]["lora_rank"] = rank
        (bank.path / "molora.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match="does not hold a router of the shape"):
            Bank.open(bank.path).load_router()


def test_a_token_ranges_router_in_a_bank(bank, write):
    bank.set_router(TokenRangeRouter(RouterConfig(kind="token_ranges", ranges=((3, 9, "y"),)), ["x", "y"]))
    assert not (bank.path / "router.safetensors").exists()
    with pytest.raises(ValueError, match="token_ranges router names 'y'; set another router first"):
        bank.remove("y")
    bank.remove("x")
    router = Bank.open(bank.path).load_router()
    assert router(torch.zeros(2, 64), torch.tensor([5, 9])).columns_TK.tolist() == [[1], [0]]


class TestWriting:
    @pytest.mark.parametrize("step", ["_write_config", "write_atomic", "shutil.copytree"])
    @pytest.mark.parametrize("change", ["add", "remove", "set_router"])
    def test_a_change_that_fails_leaves_the_bank_as_it_was(self, bank, write, key_router, monkeypatch, step, change):
        before, config = contents(bank.path), bank.config
        folder, other = write("z", seed=3), key_router(KEYS, seed=1)

        def fail(*_, **__):
            raise OSError("disk full")

        changes = {
            "add": lambda: bank.add(folder, key=torch.ones(16)),
            "remove": lambda: bank.remove("x"),
            "set_router": lambda: bank.set_router(other),
        }
        monkeypatch.setattr(f"molora.bank.{step}", fail)
        with pytest.raises(OSError, match="disk full"):
            changes[change]()
        monkeypatch.undo()
        assert contents(bank.path) == before
        assert bank.config == config == Bank.open(bank.path).config
        assert [path.name for path in bank.path.parent.iterdir() if "bank" in path.name] == ["bank"]
        bank.load_router()

    def test_create_does_not_overwrite(self, bank):
        with pytest.raises(FileExistsError, match="exists already; remove it or choose another folder"):
            Bank.create(bank.path, name="other", base=bank.config.base, router_layer=1, max_rank=8)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("router_layer", -1, "router_layer=-1"),
            ("max_rank", 0, "max_rank=0"),
            ("name", "auto", "'auto' is no legal name"),
            ("activation", "never", "activation 'never' is unknown"),
        ],
    )
    def test_create_checks_its_arguments(self, tmp_path, field, value, message):
        options = {"name": "b", "base": BaseInfo("b", "d"), "router_layer": 1, "max_rank": 8, field: value}
        with pytest.raises(ValueError, match=message):
            Bank.create(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()


class TestDamage:
    def test_no_bank(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"molora\.json does not exist; .* is not a bank"):
            Bank.open(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda raw: raw.update(colour="red"), r"unknown fields \['colour'\]"),
            (lambda raw: raw["base"].update(colour="red"), r"unknown fields \['colour'\] of BaseInfo"),
            (lambda raw: raw["adapters"][0].update(colour="red"), r"unknown fields \['colour'\] of AdapterEntry"),
            (lambda raw: raw["router"].update(colour="red"), r"unknown fields \['colour'\] of RouterEntry"),
            (lambda raw: raw["router"]["config"].update(colour="red"), r"router: unknown fields \['colour'\]"),
            (lambda raw: raw.update(format_version=2), "format version 2; this release reads version 1"),
            (lambda raw: raw.pop("base"), "field 'base' is missing"),
            (lambda raw: raw.pop("max_rank"), "max_rank"),
            (lambda raw: raw["adapters"][0].pop("digest"), "digest"),
            (lambda raw: raw["adapters"][0].update(name="../../etc"), r"'\.\./\.\./etc' is no legal name"),
            (lambda raw: raw["adapters"][0].update(name="y"), "names an adapter twice"),
            (lambda raw: raw["adapters"][0].update(activation="never"), "activation 'never' is unknown"),
            (lambda raw: raw.update(router_layer="1"), "router_layer|not supported between"),
        ],
    )
    def test_a_description_that_is_wrong(self, bank, change, message):
        edit_json(bank, change)
        with pytest.raises(ValueError, match=message) as error:
            Bank.open(bank.path)
        assert "molora.json" in str(error.value)

    def test_a_description_that_is_cut(self, bank):
        file = bank.path / "molora.json"
        file.write_text(file.read_text()[:50])
        with pytest.raises(ValueError, match="is not valid JSON"):
            Bank.open(bank.path)
        file.write_text("[]")
        with pytest.raises(ValueError, match="holds a list; expected an object"):
            Bank.open(bank.path)

    def test_adapter_weights(self, bank):
        weights = bank.adapter_folder("x") / "adapter_model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[:-3])
        with pytest.raises(ValueError, match="truncated or damaged"):
            molora.load(bank)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"adapters/x/adapter_model\.safetensors does not exist"):
            molora.load(bank)

    def test_an_adapter_that_was_exchanged(self, bank, make_adapter):
        make_adapter(seed=8).write(bank.adapter_folder("x"))
        with pytest.raises(ValueError, match=r"adapter 'x' in .* is not the one that molora\.json recorded"):
            molora.load(bank)

    def test_router_weights(self, bank, key_router):
        file = bank.path / "router.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-3])
        with pytest.raises(ValueError, match=r"router\.safetensors is truncated or damaged"):
            molora.load(bank)
        file.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"is not the router that molora\.json recorded"):
            molora.load(bank)
        file.unlink()
        with pytest.raises(FileNotFoundError, match="names a router; train it again"):
            molora.load(bank)

    def test_a_router_whose_columns_are_not_the_adapters(self, bank):
        edit_json(bank, lambda raw: raw["adapters"].pop())
        with pytest.raises(ValueError, match="the router has 3 columns, but base and 1 routable adapters need 2"):
            Bank.open(bank.path).load_router()


class TestAdaptersThatDoNotFit:
    def test_a_rank_over_the_maximum(self, bank, write):
        before = contents(bank.path)
        with pytest.raises(ValueError, match="adapter 'z' has rank 9; the bank's slots hold at most 8"):
            bank.add(write("z", rank=9))
        assert contents(bank.path) == before

    @pytest.mark.parametrize("base", ["meta/Tiny-1B", "/local/copy/of/anything"])
    def test_another_base_by_name(self, make_adapter, tmp_path, base):
        bank = Bank.create(tmp_path / "b", name="b", base=BaseInfo(base, "d"), router_layer=1, max_rank=8)
        adapter = make_adapter()
        config = replace(adapter.config, base_model_name_or_path="meta/Other-7B")
        replace(adapter, config=config).write(tmp_path / "z")
        if base.startswith("/"):  # a path says nothing of what it holds
            bank.add(tmp_path / "z")
            return
        with pytest.raises(ValueError, match="'z' was made for the base model 'meta/Other-7B'; this bank's is 'meta/T"):
            bank.add(tmp_path / "z")

    @pytest.mark.parametrize(
        ("path", "shape", "message"),
        [
            ("model.layers.1.self_attn.q_proj", (64, 32), "linear of 32 -> 64, the base model's is 64 -> 64"),
            ("model.layers.9.self_attn.q_proj", (64, 64), "has no module 'model.layers.9.self_attn.q_proj'"),
            ("model.layers.1.self_attn", (64, 64), "is a LlamaAttention; only nn.Linear layers can be adapted"),
        ],
    )
    def test_another_base_by_shape(self, make_bank, tmp_path, path, shape, message):
        adapter = random_adapter({path: shape}, rank=2, alpha=4, generator=torch.Generator())
        bank = make_bank(tmp_path, adapters={"alien": adapter})
        with pytest.raises(ValueError, match=message) as error:
            molora.load(bank)
        assert "adapter 'alien'" in str(error.value)
        assert "another base model" in str(error.value) or "LlamaAttention" in str(error.value)

    def test_outside_the_layers(self, bank, tmp_path):
        random_adapter_of_head = Adapter.from_tensors(
            molora.AdapterConfig(r=1, lora_alpha=1, target_modules=["lm_head"]),
            {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(1, 1) for side in "AB"},
        )
        random_adapter_of_head.write(tmp_path / "head")
        with pytest.raises(ValueError, match="'lm_head' is outside the decoder layers"):
            bank.add(tmp_path / "head", routable=False)

    @pytest.mark.parametrize(
        "name", ["auto", "base", "", ".", "..", "../up", "a/b", "a\\b", "/etc", ".hidden", "a\n", "ä", "x" * 65]
    )
    def test_names_that_are_not_legal(self, bank, write, name):
        before = contents(bank.path.parent)
        folder = write("z")
        with pytest.raises(ValueError, match="is no legal name: use letters, digits"):
            bank.add(folder, name=name)
        shutil.rmtree(folder.parent)
        assert contents(bank.path.parent) == before

    def test_names_that_are_unknown(self, bank):
        for use in (bank.remove, bank.load_adapter, bank.adapter_folder):
            with pytest.raises(ValueError, match="has no adapter 'z'; its adapters are: x, y"):
                use("z")


def test_the_version_is_written(bank):
    assert json.loads((bank.path / "molora.json").read_text())["format_version"] == bank_module.FORMAT_VERSION == 1
    assert isinstance(bank.load_router(), KeyRouter)


def test_a_bank_that_does_not_fit_what_it_says_is_found(make_bank, tmp_path):
    bank = make_bank(tmp_path)
    bank.check()
    for changes, words in (
        ({"max_rank": 1}, "the bank's slots hold at most 1"),
        ({"router_layer": 99}, "below the router"),
    ):
        with pytest.raises(ValueError, match=words):
            Bank(bank.path, replace(bank.config, **changes)).check()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", 5, "expected string|expected str"),
        ("name", "auto", "'auto' is no legal name"),
        ("router_layer", 1.5, "router_layer=1.5"),
        ("max_rank", True, "max_rank=True"),
        ("max_rank", 10**400, "max_rank=1000"),
        ("base", [], "BaseInfo"),
        ("adapters", {"a": 1}, "AdapterEntry"),
        ("router", [], "molora.json"),
        ("router", {"config": [], "digest": ""}, "molora.json"),
    ],
)
def test_a_description_of_wrong_values_is_refused(bank, field, value, message):
    raw = json.loads((bank.path / "molora.json").read_text())
    (bank.path / "molora.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match=message):
        Bank.open(bank.path)
