"""Settings: defaults, files, flags over files, and one line for what is wrong."""

from pathlib import Path

import pytest
import yaml

from molora.serving.config import Limits, ServeConfig, read_config
from molora.serving.engine import EngineConfig

SHIPPED = Path(__file__).parents[2] / "configs" / "serve.yaml"


def test_the_shipped_file_lists_every_setting_at_its_default():
    assert SHIPPED.read_text().splitlines()[0] == "# python serve.py --config configs/serve.yaml"
    assert read_config(SHIPPED, {}) == ServeConfig(bank="banks/smollm2-demo")
    values = yaml.safe_load(SHIPPED.read_text())
    assert list(values) == list(ServeConfig.__dataclass_fields__)
    assert list(values["engine"]) == list(EngineConfig.__dataclass_fields__)
    assert list(values["limits"]) == list(Limits.__dataclass_fields__)


def test_flags_override_the_file(write, tmp_path):
    file = write("bank: a\nport: 81\nengine: {block_size: 32, max_waiting: 7}\napi_keys: [x]\n")
    config = read_config(file, {"port": 82, "engine": {"max_waiting": 8}, "adapter_folders": [str(tmp_path)]})
    assert (config.bank, config.port, config.api_keys) == ("a", 82, ("x",))
    assert config.engine == EngineConfig(block_size=32, max_waiting=8)
    assert config.adapter_folders == (str(tmp_path),)
    assert read_config(None, {"bank": "b"}) == ServeConfig(bank="b")
    assert read_config(write("engine:\nbank: a"), {"engine": {"block_size": 8}}).engine.block_size == 8


def test_keys_from_a_file(write, tmp_path):
    (tmp_path / "keys").write_text("# of the office\none\n\n  two \n  # three\n")
    config = read_config(write(f"bank: a\napi_keys: [zero]\napi_key_file: {tmp_path / 'keys'}"), {})
    assert config.api_keys == ("zero", "one", "two")
    assert "zero" not in repr(config)
    (tmp_path / "keys").write_text(" \n# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_config(None, {"bank": "a", "api_key_file": str(tmp_path / "keys")})
    with pytest.raises(FileNotFoundError):
        read_config(None, {"bank": "a", "api_key_file": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: 1", "'bank' is missing"),
        ("bank: a\nprot: 1", "unknown key 'prot'"),
        ("bank: a\nlimits: {max_m: 1}", "unknown key 'limits.max_m'"),
        ("bank: a\nengine: {size: 1}", "unknown key 'engine.size'"),
        ("bank: a\nengine: {block_size: 0}", "block_size is 0"),
        ("bank: a\nengine: {block_size: x}", "block_size"),
        ("bank: a\nengine: 3", "engine is 3"),
        ("bank: a\nlimits: [1]", "limits is"),
        ("bank: a\nlimits: {max_n: 0}", "limits.max_n is 0"),
        ("bank: a\nlimits: {max_n: null}", "limits.max_n is None"),
        ("bank: a\nlimits: {max_n: true}", "limits.max_n is True"),
        ("bank: a\nlimits: {max_logprobs: 21}", "limits.max_logprobs is 21"),
        ("bank: a\nport: 70000", "port is 70000"),
        ("bank: a\nport: '80'", "port is '80'"),
        ("bank: a\ndrain_s: -1", "drain_s is -1"),
        ("bank: a\nkeep_alive_s: 0", "keep_alive_s is 0"),
        ("bank: a\nmax_connections: 0", "max_connections is 0"),
        ("bank: a\nnum_extra_slots: -1", "num_extra_slots is -1"),
        ("bank: 3", "bank has 3"),
        ("bank: ''", "bank has ''"),
        ("bank: a\nhost: null", "host has None"),
        ("bank: a\napi_keys: x", "api_keys is 'x'"),
        ("bank: a\napi_keys: [3]", "api_keys has 3"),
        ("bank: a\napi_keys: ['a b']", "api_keys has a key with spaces"),
        ("bank: a\napi_key_file: 3", "api_key_file has 3"),
        ("bank: a\nadapter_folders: [nowhere]", "adapter_folders names nowhere"),
        ("[1]", "holds a list"),
        ("a: [", "is no YAML"),
        ("bank: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("3: a\nbank: a", "unknown key '3'"),
    ],
)
def test_what_is_wrong_names_the_file_and_the_key(write, text, words):
    file = write(text)
    with pytest.raises(ValueError, match=r"serve\.yaml") as caught:
        read_config(file, {})
    assert words in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        read_config("nowhere.yaml", {"bank": "a"})
