"""What is trained: the bank, other routers over its adapters, and the LoRAs that it is compared with.

adapters  the bank's adapters and the newcomer's, side by side
bank      a router over the adapters, by labels, with a LoRA of its own
token     another router over the same adapters, by what each of them loses on each token
lm        another one, by the language model loss alone
own       another one by labels, whose language model loss is under its own choice
steady    the bank's router again, with a price on switches between tokens of one domain; steadier, with ten times that
open      the bank's router again, which also practises to know a newcomer by the mean of its queries
nine      one adapter more, and a router that knows it from the start
tuned     the bank's router again, from the start, while the adapters go on learning with it
joint     one LoRA of the adapters' total rank, trained on all tasks at once, on as many tokens, from the user's turn
plain     the adapters again, as plain LoRAs: active on every token
"""

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from molora.activation import Activation
from molora.adapter import Adapter
from molora.bank import Bank, BaseInfo
from molora.checkpoint import resolve_base
from molora.digest import base_digest
from molora.training.bank import AdapterStage, BankSettings, Domain, RouterStage, train_adapters, train_bank

ACTIVATION = {"first": 0.05, "before": 0.15, "turn": 0.45, "between": 0.15, "response": 0.2, "strays": 0.5}
EVERYWHERE = {"first": 1.0, "before": 0.0, "turn": 0.0, "between": 0.0, "response": 0.0, "others_rest": 0.0}
AT_TURN = {"first": 0.0, "before": 0.0, "turn": 1.0, "between": 0.0, "response": 0.0}
LABELS = {"label": 1.0, "parts": 1.0, "given": 1.0, "z": 1e-4}
ROUTERS: dict[str, dict[str, Any]] = {
    "bank": {"losses": LABELS},
    "token": {"losses": {"label": 0.0, "token": 1.0, "lm": 1.0, "z": 1e-4}},
    "lm": {"losses": {"label": 0.0, "lm": 1.0, "balance": 0.01, "z": 1e-4}},
    "own": {"losses": LABELS | {"given": 0.0, "lm": 1.0}},
    "steady": {"losses": LABELS | {"switch": 0.1}},
    "steadier": {"losses": LABELS | {"switch": 1.0}},
    "open": {"losses": LABELS | {"newcomer": 1.0}},
    "nine": {"losses": LABELS},
    "tuned": {"losses": LABELS, "adapter_lr": 5e-4},
}
STAGES = ("adapters", *ROUTERS, "joint", "plain")


def seed_folder(args: Namespace) -> Path:
    """Where all that one seed trains is kept."""
    folder: Path = args.work / f"seed-{args.seed}"
    return folder


def train(args: Namespace) -> None:
    """
    Raises:
        SystemExit: a share is asked for of other stages than the adapters, or of more shares than there are adapters.
    """
    (index, number), num_adapters = args.share, len(args.domains) + 1
    if number > 1 and args.stages != ["adapters"]:
        raise SystemExit("--share is of the stage adapters alone; expected --stages adapters.")
    if number > num_adapters:
        raise SystemExit(f"--share is {index}/{number}; there are {num_adapters} adapters.")
    for stage in args.stages:
        if stage == "adapters":
            train_adapters(of_share(settings(args, "nine"), *args.share))
        elif stage in ROUTERS:
            train_bank(settings(args, stage))
        elif stage == "joint":
            write_bank(args, "joint", train_adapters(joint_settings(args)), activation="turn")
        else:
            write_bank(args, "plain", train_adapters(plain_settings(args)), activation=0)


def of_share(whole: BankSettings, index: int, number: int) -> BankSettings:
    """The same with every n-th adapter from the i-th on."""
    names = [*whole.adapters.domains][index - 1 :: number]
    domains = {name: whole.adapters.domains[name] for name in names}
    return replace(whole, adapters=replace(whole.adapters, domains=domains))


def write_bank(args: Namespace, name: str, folders: dict[str, Path], activation: Activation) -> None:
    """A bank without a router."""
    folder = seed_folder(args) / name
    shutil.rmtree(folder, ignore_errors=True)
    bank = Bank.create(
        folder,
        name=name,
        base=BaseInfo(args.base, base_digest(resolve_base(args.base))),
        router_layer=args.router_layer,
        max_rank=max(Adapter.read(each).max_rank for each in folders.values()),
        activation=activation,
    )
    for each, adapter in folders.items():
        bank.add(adapter, name=each, activation=activation, routable=False)


def settings(args: Namespace, stage: str = "bank") -> BankSettings:
    data, folder = args.work / "data", seed_folder(args)
    domains, router_data = args.domains, "train_router.jsonl"
    labels_only = ["train_unknown.jsonl"] if ROUTERS.get(stage, ROUTERS["bank"])["losses"]["label"] else []
    if stage == "nine":
        domains, router_data = [*args.domains, args.newcomer], "train_router_newcomer.jsonl"
    return BankSettings(
        base=args.base,
        output=str(folder / stage),
        work=str(folder / "stages"),
        seed=args.seed,
        router_layer=args.router_layer,
        adapters=AdapterStage(
            domains={domain: Domain(str(data / f"train_{domain}.jsonl")) for domain in domains},
            model={"rank": args.rank, "alpha": 2 * args.rank, "schedule": {"lr": 0.002, "warmup_steps": 50}},
            data={"row_length": 512, "rows": args.rows, "activation": ACTIVATION | {"strangers": args.strangers}},
            trainer=trainer(args, args.steps),
        ),
        router=RouterStage(
            model={
                "router": {"kind": "keys", "gate": "hard", "hidden_dim": 256, "key_dim": 64, "lora_rank": 32},
                "schedule": {"lr": 0.001, "warmup_steps": 50, "weight_decay": 0.01},
                **ROUTERS[stage],
                "losses": ROUTERS[stage]["losses"] | {"drift": args.drift},
            },
            data={
                "train": [str(data / name) for name in (router_data, *labels_only)],
                "row_length": 512,
                "rows": 2 * args.rows,
                "activation": {"turn": 0.7, "response": 0.2, "between": 0.1},
            },
            trainer=trainer(args, args.router_steps),
        ),
    )


def joint_settings(args: Namespace) -> BankSettings:
    """One LoRA of the total rank, on as many tokens as all adapters together; the same scaling, 2."""
    own, rank = settings(args), args.rank * len(args.domains)
    stage = AdapterStage(
        domains={"joint": Domain(str(args.work / "data" / "joint.jsonl"))},
        model=own.adapters.model | {"rank": rank, "alpha": 2 * rank},
        data={"row_length": 512, "rows": args.rows * len(args.domains), "activation": AT_TURN},
        trainer=own.adapters.trainer,
    )
    return replace(own, adapters=stage)


def plain_settings(args: Namespace) -> BankSettings:
    own = settings(args)
    return replace(own, adapters=replace(own.adapters, data=own.adapters.data | {"activation": EVERYWHERE}))


def trainer(args: Namespace, steps: int) -> dict[str, Any]:
    device = {"accelerator": "cpu"} if args.device == "cpu" else {}
    return {
        **device,
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 50,
        "enable_progress_bar": False,
    }
