"""Ask a server through litellm, as a program does that talks to many providers: an answer, a stream, a text.

    pip install litellm
    python serve.py --bank banks/smollm2-demo --port 8000
    LITELLM_LOCAL_MODEL_COST_MAP=True python examples/litellm_client.py --base-url http://localhost:8000/v1

The variable keeps litellm from fetching its list of prices when it is imported.
"""

import argparse
from collections.abc import Sequence

import litellm


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none", help="one of the server's, where it has any")
    parser.add_argument("--model", default="smollm2-demo", help="a model of the server's; here the bank's router")
    options = parser.parse_args(argv)
    server = {"api_base": options.base_url, "api_key": options.api_key}

    messages = [{"role": "user", "content": "How many legs do 5 spiders and 2 dogs have in total?"}]
    answer = litellm.completion(f"openai/{options.model}", messages, max_tokens=48, **server)
    print(answer.choices[0].message.content)
    print(answer.usage.prompt_tokens, "tokens read,", answer.usage.completion_tokens, "written")

    for chunk in litellm.completion(f"openai/{options.model}", messages, max_tokens=48, stream=True, **server):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    model = f"text-completion-openai/{options.model}"
    answer = litellm.text_completion(prompt="Once upon a time", model=model, max_tokens=16, **server)
    print(answer.choices[0].text)


if __name__ == "__main__":
    main()
