"""Best of n at test time: one adapter drafts, another one scores, and both share the base's cache.

Taken is the answer whose drafts have most of the check's scores together.

    python examples/best_of_n.py --bank banks/functions --draft arithmetic --n 8 "What is 417 plus 385 minus 96?"

The drafts are drawn from one reading of the question. The check reads it once as the base reads it, and then only what
differs: each draft, and the few tokens of its invocation.
"""

import argparse

import molora
from molora.serving.functions import Function, best_of_n

CHECK = Function("check", "Is this answer right, yes or no?", ("yes", "no"))


def answer_of(text: str) -> str:
    """What a draft comes to: what stands behind its last "Answer:", or all of it."""
    return text.rpartition("Answer:")[2].strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--bank", required=True, help="a bank with the function `check`; see docs/functions.md")
    parser.add_argument("--draft", default="auto", help="who drafts: an adapter, or auto, the router")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device")
    options = parser.parse_args(arguments)

    m = molora.load(options.bank, device=options.device)
    found = best_of_n(
        m,
        [{"role": "user", "content": options.question}],
        check=CHECK,
        draft=options.draft,
        n=options.n,
        temperature=options.temperature,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        answer_of=answer_of,
    )
    for index, (draft, verdict) in enumerate(zip(found.drafts, found.verdicts, strict=True)):
        mark = "*" if index == found.best else " "
        print(f"{mark} {verdict.score:.3f}  {draft.text!r}")
        print(f"         check: {verdict.num_reused_tokens} of {verdict.num_prompt_tokens} tokens reused")
    print(f"in all {found.num_reused_tokens} tokens reused, {found.num_computed_tokens} computed")


if __name__ == "__main__":
    main()
