"""Ask a bank from Python: the base reads a document, then the router answers, token by token, and says who wrote what.

python examples/generate.py
python examples/generate.py --bank banks/mine
"""

import argparse
from collections.abc import Sequence

import molora

DOCUMENT = "The shop opens at nine. Ava counted the stock twice and wrote both numbers down."
QUESTIONS = ["When does the shop open?", "Please sort 31, 7, 58 and 12 from smallest to largest."]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", default="banks/smollm2-demo")
    m = molora.load(parser.parse_args(argv).bank)

    messages = [{"role": "user", "content": f"{DOCUMENT} {QUESTIONS[0]}"}]
    first = m.generate(messages, route="base", max_new_tokens=32)
    print(first.text)

    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
    with m.stream(messages, route="auto", max_new_tokens=48) as stream:
        for token in stream:
            who = ", ".join(f"{name} {gate:.2f}" for name, gate in token.route) or "base"
            print(f"{token.text!r:16}{who}")
    answer = stream.result
    print(f"{answer.num_reused_tokens} of {answer.num_prompt_tokens} tokens of the prompt had been read before")


if __name__ == "__main__":
    main()
