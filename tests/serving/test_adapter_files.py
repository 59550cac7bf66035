"""Which files of an adapter are opened at all, and what hostile ones do."""

import json
import os
import re
from contextlib import suppress

import pytest
from safetensors.torch import save_file

from molora.serving.adapter_files import check_adapter
from molora.serving.config import Limits
from molora.serving.errors import InvalidRequestError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path, make_adapter):
    """Adapters may be loaded from here; a good one lies inside, and one outside."""
    make_adapter(seed=1).write(tmp_path / "in" / "good")
    make_adapter(seed=1).write(tmp_path / "out" / "good")
    return tmp_path / "in"


@pytest.fixture
def refused(folder):
    def refused(path, status, words, **limits):
        with pytest.raises(InvalidRequestError, match=words) as caught:
            check_adapter(str(path), [str(folder)], Limits(**limits))
        assert (caught.value.status, caught.value.param) == (status, "lora_path")

    return refused


def test_what_lies_inside_is_read(folder, tmp_path):
    for path in ("good", "./good", "good/", str(folder / "good")):
        assert check_adapter(path, [str(tmp_path / "nowhere"), str(folder)], Limits()) == folder.resolve() / "good"


def test_links_that_stay_inside_are_followed(folder):
    (folder / "alias").symlink_to(folder / "good")
    assert check_adapter("alias", [str(folder)], Limits()) == folder.resolve() / "good"
    (folder / "linked").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / "linked" / name).symlink_to(folder / "good" / name)
    check_adapter("linked", [str(folder)], Limits())


def test_paths_that_lead_out(folder, tmp_path, refused):
    (folder / "way-out").symlink_to(tmp_path / "out")
    refused("../out/good", 400, re.escape("'..'"))
    refused("good/../good", 400, re.escape("'..'"))
    refused("good\0", 400, "null")
    refused(tmp_path / "out" / "good", 403, "outside")
    refused(tmp_path / "out" / "nothing", 403, "outside")
    refused("/", 403, "outside")
    refused("way-out/good", 403, "outside")
    refused("way-out/nothing", 403, "outside")
    refused(folder / "way-out" / "good", 403, "outside")
    refused(str(folder) + "-2", 403, "outside")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_that_lead_out(folder, tmp_path, refused, name):
    (folder / "good" / name).unlink()
    (folder / "good" / name).symlink_to(tmp_path / "out" / "good" / name)
    refused("good", 403, "leads out")
    (folder / "good" / name).unlink()
    (folder / "good" / name).symlink_to("/dev/zero")
    refused("good", 403, "leads out")


def test_what_is_not_there(folder, refused):
    refused("nothing", 404, "no folder")
    refused("good/adapter_config.json", 404, "no folder")
    refused("s3://bucket/good", 404, "no folder")
    (folder / "good" / CONFIG).unlink()
    refused("good", 404, CONFIG)


def test_paths_that_no_file_system_follows(folder):
    (folder / "loop").symlink_to(folder / "loop")
    for path in ("loop", "x" * 5000, "x/" * 5000):
        with pytest.raises(InvalidRequestError) as caught:
            check_adapter(path, [str(folder)], Limits())
        assert caught.value.status in (403, 404)


def test_pickled_weights_are_not_read(folder, refused):
    (folder / "good" / WEIGHTS).rename(folder / "good" / "adapter_model.bin")
    refused("good", 404, "pickled")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_or_a_folder_is_no_file(folder, refused, name):
    (folder / "good" / name).unlink()
    os.mkfifo(folder / "good" / name)
    refused("good", 400, "no regular file")
    (folder / "good" / name).unlink()
    (folder / "good" / name).mkdir()
    refused("good", 400, "no regular file")


def test_limits(folder, refused):
    num_bytes = sum((folder / "good" / name).stat().st_size for name in (CONFIG, WEIGHTS))
    refused("good", 413, "too large", max_adapter_bytes=num_bytes - 1)
    refused("good", 400, "rank 4", max_adapter_rank=3)
    check_adapter("good", [str(folder)], Limits(max_adapter_bytes=num_bytes, max_adapter_rank=4))
    with (folder / "good" / CONFIG).open("a") as file:
        file.truncate(2 << 20)
    refused("good", 413, "too large")


@pytest.mark.parametrize(
    "change",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        "\udcff",
        {"peft_type": "LOHA"},
        {"r": 0},
        {"r": True},
        {"r": 10**30},
        {"r": "4"},
        {"lora_alpha": []},
        {"lora_alpha": "much"},
        {"lora_alpha": float("nan")},
        {"rank_pattern": ["a"]},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"a": "b"}},
        {"alpha_pattern": 3},
        {"target_modules": 5},
        {"alora_invocation_tokens": "abc"},
        {"auto_map": {"x": "evil.Code"}},
    ],
)
def test_hostile_configurations_are_refused_or_harmless(folder, change):
    file = folder / "good" / CONFIG
    if isinstance(change, str):
        file.write_bytes(change.encode("utf-8", "surrogateescape"))
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with suppress(InvalidRequestError):  # and no other error
        check_adapter("good", [str(folder)], Limits())


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}", b"PK\x03\x04"]
)
def test_hostile_weights(folder, refused, content):
    (folder / "good" / WEIGHTS).write_bytes(content)
    refused("good", 400, "no adapter")


def test_a_scaling_that_is_no_number(folder, refused):
    file = folder / "good" / CONFIG
    config = json.loads(file.read_text())
    for alpha in (float("nan"), float("inf"), 1e308 * 10):
        file.write_text(json.dumps(config | {"lora_alpha": alpha}))
        refused("good", 400, "lora_alpha")


def test_foreign_and_cut_weights(folder, refused, make_adapter):
    file = folder / "good" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused("good", 400, "no adapter")
    tensors = make_adapter(seed=1).tensors()
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, file)
    refused("good", 400, "no adapter")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file)
    refused("good", 400, "not a number")
