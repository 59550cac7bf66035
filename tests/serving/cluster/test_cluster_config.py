"""Settings of the form on Ray Serve, and one line where they are wrong or Ray is missing."""

import sys
import warnings
from pathlib import Path

import pytest
import yaml

from molora.serving import cli
from molora.serving.cluster.config import ClusterConfig, RayConfig, read_cluster_config
from molora.serving.config import ServeConfig

SHIPPED = Path(__file__).parents[3] / "configs" / "serve_ray.yaml"


def test_the_shipped_file_lists_every_setting_at_its_default():
    assert SHIPPED.read_text().splitlines()[0] == "# python serve.py --ray --config configs/serve_ray.yaml"
    assert read_cluster_config(SHIPPED, {}) == ClusterConfig(ServeConfig(bank="banks/smollm2-demo"), RayConfig())
    assert list(yaml.safe_load(SHIPPED.read_text())["ray"]) == list(RayConfig.__dataclass_fields__)


def test_flags_override_the_server_s_settings(write):
    file = write("bank: a\nport: 81\nengine: {block_size: 32}\nray: {min_replicas: 2, max_replicas: 3}")
    config = read_cluster_config(file, {"port": 82, "engine": {"max_waiting": 8}})
    assert (config.server.port, config.server.engine.block_size, config.server.engine.max_waiting) == (82, 32, 8)
    assert (config.ray.min_replicas, config.ray.max_replicas) == (2, 3)
    assert read_cluster_config(None, {"bank": "b"}) == ClusterConfig(ServeConfig(bank="b"), RayConfig())


@pytest.mark.parametrize(
    ("section", "target"), [("", 16), ("max_ongoing_requests: 8", 8), ("max_ongoing_requests: 20", 16)]
)
def test_the_target_follows_the_limit(write, section, target):
    assert read_cluster_config(write(f"bank: a\nray: {{{section}}}"), {}).ray.target == target


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ray: {}", "'bank' is missing"),
        ("bank: a\nray: {replicas: 2}", "unknown key 'ray.replicas'"),
        ("bank: a\nray: 2", "ray is 2"),
        ("bank: a\nray: {min_replicas: 0}", "ray.min_replicas is 0"),
        ("bank: a\nray: {min_replicas: null}", "ray.min_replicas is None"),
        ("bank: a\nray: {num_gpus: -1}", "ray.num_gpus is -1"),
        ("bank: a\nray: {target_ongoing_requests: 0}", "ray.target_ongoing_requests is 0"),
        ("bank: a\nray: {num_cpus: '1'}", "ray.num_cpus is '1'"),
        ("bank: a\nray: {address: 3}", "ray.address has 3"),
        ("bank: a\nray: {min_replicas: 3}", "ray.min_replicas is 3, over ray.max_replicas, 2"),
        ("bank: a\nray: {target_ongoing_requests: 65}", "over ray.max_ongoing_requests, 64"),
        ("bank: a\nmax_connections: 5", "max_connections is not supported on Ray"),
        ("bank: a\nlog_format: xml", "log_format is 'xml'"),
        ("bank: a\nprot: 1", "unknown key 'prot'"),
    ],
)
def test_what_is_wrong_is_named(write, text, words):
    file = write(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_cluster_config(file, {})
    assert str(caught.value).startswith(f"{file}: ")


def test_a_file_of_ray_s_without_the_flag(capsys):
    assert cli.main(["--config", str(SHIPPED), "--port", "0"]) == 2
    assert "'ray' is for --ray" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("molora.serving.cluster.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["--ray", "--bank", "banks/smollm2-demo", "--port", "0"]) == 2
    assert "pip install 'molora[ray]'" in capsys.readouterr().err


def test_wrong_settings_are_known_before_ray_starts(capsys):
    assert cli.main(["--ray", "--port", "0"]) == 2
    assert "'bank' is missing" in capsys.readouterr().err


def test_a_bank_that_is_not_there_is_known_before_ray_starts(capsys, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own modules, when they are imported
        assert cli.main(["--ray", "--bank", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert f"{tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_without_opentelemetry_its_extra_is_named_before_ray_starts(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own modules, when they are imported
        from molora.serving.cluster import deploy
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    server = ServeConfig(bank="a", otlp_endpoint="http://localhost:1/v1/traces")
    with pytest.raises(ValueError, match=r"pip install 'molora\[otel\]'"):
        deploy.serve_on_ray(ClusterConfig(server, RayConfig(address="head:1")))


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_what_does_not_start_is_taken_out_of_a_cluster_that_goes_on(monkeypatch, capsys, error):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own modules, when they are imported
        from molora.serving.cluster import deploy

    def fail(*args, **options):
        raise error

    done = []
    monkeypatch.setattr(deploy, "start_ray", lambda address, log_format: done.append(address))
    monkeypatch.setattr(deploy.serve, "start", lambda **options: None)
    monkeypatch.setattr(deploy.serve, "run", fail)
    monkeypatch.setattr(deploy.serve, "delete", lambda name, _blocking: done.append(name))
    monkeypatch.setattr(deploy.ray, "shutdown", lambda: done.append("left"))
    config = ClusterConfig(ServeConfig(bank="a"), RayConfig(address="head:1"))
    with pytest.raises(type(error)):
        deploy.serve_on_ray(config)
    assert done == ["head:1", "molora", "left"]
    assert "Starting 1 replicas of a" in capsys.readouterr().out
