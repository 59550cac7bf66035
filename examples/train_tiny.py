"""Train two adapters side by side and a router over them with Lightning, from Python, and load the bank that comes out.

    python examples/train_tiny.py --out runs/example

A random base of 0.2 M parameters and configs/tiny.jsonl: less than a minute on a CPU, and nothing is downloaded. With a
real base, a GPU and data of your own, the same lines make a bank that is good for something.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import molora
from molora.training import AdapterTraining, ChatData, RouterTraining
from molora.training.frozen import Schedule
from molora.training.trainer import Trainer

BASE = "tiny-random/llama"
NAMES = ["letters", "digits"]  # the domains of the data, too


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--data", default="configs/tiny.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(argv)
    schedule = Schedule(lr=0.01, warmup_steps=5)

    def trainer() -> Trainer:
        return Trainer(accelerator="cpu", max_steps=options.steps, logger=False, enable_checkpointing=False)

    def data() -> ChatData:
        return ChatData(options.data, row_length=256, rows=4)

    adapters = AdapterTraining(
        NAMES, output_dir=str(options.out / "adapters"), base=BASE, rank=4, alpha=8, router_layer=1, schedule=schedule
    )
    trainer().fit(adapters, datamodule=data())

    router = RouterTraining(
        [str(options.out / "adapters" / name) for name in NAMES],
        output=str(options.out / "bank"),
        base=BASE,
        router=molora.RouterConfig(hidden_dim=32, key_dim=16),
        router_layer=1,
        schedule=schedule,
    )
    trainer().fit(router, datamodule=data())

    m = molora.load(options.out / "bank", device="cpu")
    for question in ("5 times g", "5 times 3"):
        out = m.generate([{"role": "user", "content": question}], max_new_tokens=8)
        routes = ["+".join(name for name, _ in route) or "base" for route in out.generated_routes]
        print(f"{question}: {out.text!r} by {routes}")


if __name__ == "__main__":
    main()
