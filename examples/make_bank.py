"""Make a bank of two PEFT adapters in Python, with a router that needs no training: one adapter reads digits.

    python examples/make_bank.py --out banks/by-hand
    python examples/make_bank.py --out banks/by-hand --digits my/adapters/sums --rest my/adapters/words

The base is the one that the adapters name. `token_ranges` routes by token id alone, which is as transparent as a router
can be; train_tiny.py has a learned one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import molora
from molora.checkpoint import load_base, resolve_base
from molora.digest import base_digest

ADAPTERS = Path("banks/smollm2-demo/adapters")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the bank's folder, which must not exist")
    parser.add_argument("--digits", type=Path, default=ADAPTERS / "arithmetic", help="a PEFT folder")
    parser.add_argument("--rest", type=Path, default=ADAPTERS / "words", help="a PEFT folder")
    parser.add_argument("--base", help="folder or hub name of the base; the one that the adapters name if left out")
    options = parser.parse_args(argv)

    folders = {"digits": options.digits, "rest": options.rest}
    adapters = {name: molora.Adapter.read(folder) for name, folder in folders.items()}
    name = options.base or adapters["digits"].config.base_model_name_or_path
    base_folder = resolve_base(name)
    bank = molora.Bank.create(
        options.out,
        name=Path(options.out).name,
        base=molora.BaseInfo(name, base_digest(base_folder)),
        router_layer=min(adapter.layers[0] for adapter in adapters.values()),
        max_rank=max(adapter.max_rank for adapter in adapters.values()),
    )
    bank.add_all(adapters, activation="turn")

    _, tokenizer = load_base(base_folder, device="cpu")
    digits = {tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    ranges = [(0, len(tokenizer), "rest")]
    for token_id in sorted(digits):
        first, last, _ = ranges.pop()
        ranges += [(first, token_id, "rest"), (token_id, token_id + 1, "digits"), (token_id + 1, last, "rest")]
    ranges = [(first, last, name) for first, last, name in ranges if first < last]
    config = molora.RouterConfig(kind="token_ranges", ranges=tuple(ranges))
    bank.set_router(molora.TokenRangeRouter(config, list(folders)))

    m = molora.load(options.out)
    out = m.generate([{"role": "user", "content": "What is 47 plus 12?"}], max_new_tokens=16)
    for token_id, route in zip(out.token_ids, out.routes, strict=True):  # who read each token
        print(f"{tokenizer.decode([token_id])!r:16}{', '.join(name for name, _ in route) or 'base'}")


if __name__ == "__main__":
    main()
