"""The command that rebuilds the demo's data: `python -m molora.training.recipes --out data/`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from molora.training.recipes.build import build, num_files, write
from molora.training.recipes.tasks import DEMO


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line (or `arguments`), write the files and say how many records each holds."""
    parser = argparse.ArgumentParser(
        prog="python -m molora.training.recipes", description="Rebuild the demo's data, or build that of other tasks."
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default: 0)")
    parser.add_argument("--num-train", type=int, default=30000, help="training records an adapter (default: 30000)")
    parser.add_argument(
        "--domains",
        nargs="+",
        default=DEMO,
        metavar="DOMAIN",
        help=f"the tasks (default: the demo's: {' '.join(DEMO)})",
    )
    options = parser.parse_args(arguments)

    console = Console()
    files = build(options.seed, options.num_train, options.domains)
    try:
        summary = write(
            options.out,
            track(files, total=num_files(options.domains), description="Building", console=console),
            seed=options.seed,
            num_train=options.num_train,
            domains=options.domains,
        )
    except ModuleNotFoundError as error:
        parser.error(f'{error.name} is not installed; pip install -e ".[data]" installs what the recipe needs')
    except ValueError as error:
        parser.error(str(error))
    for name, file in summary["files"].items():
        console.print(f"{file['num_records']:6,}  {options.out / name}", highlight=False)


if __name__ == "__main__":
    main()
