"""Route a model in your own transformers code: its own `generate`, with a streamer, inside `m.routing(...)`.

python examples/transformers_generate.py
python examples/transformers_generate.py --bank banks/mine --route base
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import TextStreamer

import molora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", default="banks/smollm2-demo")
    parser.add_argument("--route", default="auto", help="auto, base, or an adapter's name")
    options = parser.parse_args(argv)

    m = molora.load(options.bank)
    prompt = m.render([{"role": "user", "content": "How many legs do 5 spiders and 2 dogs have in total?"}])
    start = m.activation_start(prompt, options.route)  # the bank's own policy
    input_ids = torch.tensor([prompt.token_ids], device=m.model.device)
    streamer = TextStreamer(m.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with m.routing([start], route=options.route):
        m.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=m.tokenizer.eos_token_id,
            streamer=streamer,
        )


if __name__ == "__main__":
    main()
