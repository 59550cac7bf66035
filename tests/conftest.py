"""Tiny random base models and banks whose adapters are strong enough to change greedy answers.

Without a GPU the Triton kernels run in Triton's interpreter. That is decided before Triton is first imported, which
is here, whichever folder of tests is collected first.
"""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # today's default; Triton 3.9 warns on a GPU while it is unset
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from molora_kernels import backend

import molora
from molora import Adapter, Bank, BaseInfo, KeyRouter, MoLoRA, RouterConfig
from molora.activation import render
from molora.adapter import LoraWeights, layer_index, random_adapter
from molora.checkpoint import load_base
from molora.digest import base_digest
from molora.injection import linears_of_layers
from molora.router import Router
from molora.serving import engine as engine_module
from molora.serving.engine import Engine, EngineConfig
from molora.tiny import byte_tokenizer, make_tiny_base

torch.set_num_threads(1)  # nothing here is large enough to share, and many threads wait for each other

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("no deadline")

REPOSITORY = Path(__file__).parents[1]
HIDDEN_SIZE = 64
ROUTER_LAYER = 1
KEYS = RouterConfig(hidden_dim=32, key_dim=16)


def make_key_router(config: RouterConfig = KEYS, *, num_columns: int = 3, seed: int = 0) -> KeyRouter:
    """Random keys, and no biases, so that every column is taken by some token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = KeyRouter(config, HIDDEN_SIZE, num_columns)
    with torch.no_grad():
        router.hidden.bias.zero_()
        router.query.bias.zero_()
    return router.eval()


def _router_lora(model: Any, config: RouterConfig) -> dict[str, LoraWeights]:
    """On all linears below the router layer, strong enough to change routes and answers."""
    shapes = {
        path: tuple(model.get_submodule(path).weight.shape)
        for path in linears_of_layers(model)
        if layer_index(path) < ROUTER_LAYER
    }
    generator = torch.Generator().manual_seed(7)
    return random_adapter(shapes, rank=config.lora_rank, alpha=config.lora_alpha, generator=generator, std=0.2).weights


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """None: plans of a CPU have no tables for kernels, as in use. Tests of kernels have a fixture of this name, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "INTERPRETED", False)
        yield


@pytest.fixture(scope="module", autouse=True)
def small_caches() -> Iterator[None]:
    """For engines that are given no size: the zeros of the 1 GB that they take otherwise need most of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CPU_CACHE_BYTES", 1 << 27)
        yield


@pytest.fixture(scope="session")
def key_router() -> Callable[..., KeyRouter]:
    return make_key_router


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny base of an architecture, made once. Every id of its vocabulary decodes to something."""
    made: dict[tuple[Any, ...], Path] = {}

    def of(architecture: str = "llama", **overrides: Any) -> Path:
        key = (architecture, *sorted(overrides.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / "tiny"
            made[key] = make_tiny_base(
                folder, seed=0, architecture=architecture, vocab_size=259, max_position_embeddings=1024, **overrides
            )
        return made[key]

    return of


@pytest.fixture(scope="session")
def base_model(base_dir: Callable[..., Path]) -> Callable[..., Any]:
    """A fresh Hugging Face model, as it comes."""

    def of(architecture: str = "llama", **overrides: Any) -> Any:
        return load_base(base_dir(architecture, **overrides), device="cpu", dtype="float32")[0]

    return of


@pytest.fixture(scope="session")
def linear_shapes(base_model: Callable[..., Any]) -> Callable[..., dict[str, tuple[int, int]]]:
    """The decoder's linears from a layer on: (out, in) features by module path."""
    modules = {
        name: (module.out_features, module.in_features)
        for name, module in base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }

    def of(*, first_layer: int = ROUTER_LAYER, last_layer: int = 99, ends: Sequence[str] = ("",)) -> dict[str, Any]:
        return {
            name: shape
            for name, shape in modules.items()
            if first_layer <= int(name.split(".")[2]) <= last_layer and name.endswith(tuple(ends))
        }

    return of


@pytest.fixture(scope="session")
def make_adapter(linear_shapes: Callable[..., dict[str, tuple[int, int]]]) -> Callable[..., Adapter]:
    """An adapter that changes answers: random weights of std 0.2 at alpha 64."""

    def make(*, seed: int = 0, rank: int = 4, alpha: float = 64, std: float = 0.2, **where: Any) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return random_adapter(linear_shapes(**where), rank=rank, alpha=alpha, generator=generator, std=std)

    return make


@pytest.fixture(scope="session")
def make_bank(
    base_dir: Callable[..., Path], base_model: Callable[..., Any], make_adapter: Callable[..., Adapter]
) -> Callable[..., Bank]:
    """A bank of the adapters "x" and "y" (and others, if given), and a router if given."""

    def make(
        folder: Path,
        *,
        architecture: str = "llama",
        adapters: dict[str, Adapter] | None = None,
        router: Router | None = None,
        **overrides: Any,
    ) -> Bank:
        base = base_dir(architecture, **overrides)
        info = BaseInfo(str(base), base_digest(base))
        bank = Bank.create(folder / "bank", name="tiny", base=info, router_layer=ROUTER_LAYER, max_rank=8)
        if adapters is None:
            adapters = {"x": make_adapter(seed=1), "y": make_adapter(seed=2)}
        for name, adapter in adapters.items():
            adapter.write(folder / "adapters" / name)
            bank.add(folder / "adapters" / name, activation="turn")
        if isinstance(router, KeyRouter) and router.config.lora_rank:
            router.lora = _router_lora(base_model(architecture, **overrides), router.config)
        if router is not None:
            bank.set_router(router)
        return bank

    return make


@pytest.fixture(scope="session")
def make_function_bank(
    make_bank: Callable[..., Bank], make_adapter: Callable[..., Adapter], key_router: Callable[..., KeyRouter]
) -> Callable[..., Bank]:
    """A bank of "x", "y", a router, and functions, by their names and the texts that invoke them."""

    def make(folder: Path, invocations: dict[str, str]) -> Bank:
        bank = make_bank(folder, router=key_router())
        for seed, (name, text) in enumerate(invocations.items(), 11):
            asked = render(byte_tokenizer(), [{"role": "user", "content": text}])
            ids = list(asked.token_ids[asked.starts["turn"] : asked.starts["response"]])
            adapter = make_adapter(seed=seed)
            config = replace(adapter.config, alora_invocation_tokens=ids)
            bank.add_all({name: Adapter.from_tensors(config, adapter.tensors())})
        return bank

    return make


@pytest.fixture(scope="session")
def _loaded() -> dict[Any, MoLoRA]:
    return {}


@pytest.fixture
def load_model(
    make_bank: Callable[..., Bank], tmp_path_factory: pytest.TempPathFactory, _loaded: dict[Any, MoLoRA]
) -> Iterator[Callable[..., MoLoRA]]:
    """A model with adapters "x" and "y" and a router; loaded once for each configuration, its cache emptied."""

    def load(architecture: str = "llama", *, router: RouterConfig = KEYS, **overrides: Any) -> MoLoRA:
        key = (architecture, router, *sorted(overrides.items()))
        if key not in _loaded:
            keys = make_key_router(router) if router.kind == "keys" else molora.TokenRangeRouter(router, ["x", "y"])
            folder = tmp_path_factory.mktemp("model")
            bank = make_bank(folder, architecture=architecture, router=keys, **overrides)
            _loaded[key] = molora.load(bank, device="cpu", dtype="float32")
            _loaded[key]._engine = Engine(_loaded[key], EngineConfig(kv_cache_bytes=1 << 24))
        model = _loaded[key]
        model.engine.clear_cache()
        return model

    yield load
    for model in _loaded.values():
        assert model.decoder.routes.request is None, "a test left its routes behind"
        model.model.eval()


@pytest.fixture
def m(load_model: Callable[..., MoLoRA]) -> MoLoRA:
    """The Llama-shaped one."""
    return load_model()


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., list[int]]:
    """Random token ids without special ones."""

    def draw(length: int, *, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    return draw


@pytest.fixture(scope="module")
def benchmark_module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of `benchmarks/` by its name there; all of them are forgotten behind the tests of a file."""
    folder = REPOSITORY / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A script by its path in the repository, without what it does when it is run."""

    def load(path: str) -> ModuleType:
        name = path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def example(load_script: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    return lambda name: load_script(f"examples/{name}.py")


@pytest.fixture(scope="session")
def listening() -> Callable[[Any], AbstractContextManager[str]]:
    """An app on a socket of this machine; where it listens."""
    import uvicorn

    @contextmanager
    def listen(app: Any) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.001)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return listen
