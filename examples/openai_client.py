"""Ask a server with the official `openai` SDK: models, a stream with routes, and an answer that fits a JSON schema.

python serve.py --bank banks/smollm2-demo --port 8000
python examples/openai_client.py --base-url http://localhost:8000/v1
"""

import argparse
from collections.abc import Sequence
from typing import Literal

import pydantic
from openai import OpenAI


class Order(pydantic.BaseModel):
    order: Literal["rising", "falling", "neither"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none", help="one of the server's, where it has any")
    options = parser.parse_args(argv)
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)

    models = [model.id for model in client.models.list()]
    print("models:", *models)
    router = models[0]  # the bank's name; `<bank>:<adapter>` is one adapter, and the base has its own name

    stream = client.chat.completions.create(
        model=router,
        messages=[{"role": "user", "content": "Please sort 31, 7, 58 and 12 from smallest to largest."}],
        max_tokens=32,
        stream=True,
        logprobs=True,  # an entry for each token, which says who wrote it
        extra_body={"return_routes": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            for entry in choice.logprobs.content if choice.logprobs else []:
                adapters = entry.model_extra["route"]["adapters"]
                print(f"{entry.token!r:16}{', '.join(name for name, _ in adapters) or 'base'}")

    answer = client.chat.completions.parse(
        model=router,
        messages=[{"role": "user", "content": "In which order are 3, 5 and 9? Answer as JSON."}],
        max_tokens=128,
        response_format=Order,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
