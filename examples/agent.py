"""An agent that calls adapters as functions over one conversation, through the server and OpenAI's own client.

    python serve.py --bank banks/functions --port 8000
    python examples/agent.py --bank smollm2-demo      # the name that the server gives the bank

Before it answers it asks whether the text says it (`answerability`), or how many drafts the question wants
(`uncertainty`); behind each draft it asks whether that is right (`check`), and drafts again, or says that it does not
know. Each call reads the conversation as the base has read it, so what was read once is reused.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import openai

FUNCTIONS = {
    "answerability": "Does the text answer this, yes or no?",
    "uncertainty": "Will your answer be right, yes or no?",
    "check": "Is this answer right, yes or no?",
}
NOTE = "Maria works as a nurse. Maria lives in Garrowby. Felix keeps a parrot. Felix turned 41 this year."
QUESTIONS = ("Where does Maria live?", "Which instrument does Felix practise?")
TASKS = ("What is 417 plus 385 minus 96?", "How many legs do 5 spiders and 2 dogs have in total?")


@dataclass
class Agent:
    """One conversation.

    Attributes:
        client: of a server whose bank has the functions.
        bank: its name: the model that is its router.
        max_drafts: of one answer, where the first ones will not do.
    """

    client: openai.OpenAI
    bank: str
    max_drafts: int = 4
    max_tokens: int = 128
    messages: list[dict[str, str]] = field(default_factory=list)

    def call(self, function: str, *more: dict[str, str]) -> float:
        """The probability of "yes", of a function that is called behind the conversation and `more` of it."""
        asked = {"role": "user", "content": FUNCTIONS[function]}
        answer = self.client.chat.completions.create(
            model=f"{self.bank}:{function}",  # its policy is `invocation`: it acts from the invocation on
            messages=[*self.messages, *more, asked],
            logprobs=True,
            top_logprobs=20,
            extra_body={"structured_outputs": {"regex": "yes|no"}},
        )
        likely = answer.choices[0].logprobs.content[0].top_logprobs
        yes, no = (
            sum(math.exp(each.logprob) for each in likely if each.token and label.startswith(each.token))
            for label in ("yes", "no")
        )
        score = yes / (yes + no) if yes + no else float(answer.choices[0].message.content == "yes")
        self.report(function, answer.usage, f"yes {score:.3f}")
        return score

    def draft(self, seed: int) -> str:
        """One answer to the conversation, by the bank's router; the first one is greedy."""
        answer = self.client.chat.completions.create(
            model=self.bank,
            messages=self.messages,
            max_tokens=self.max_tokens,
            temperature=1.0 if seed else 0.0,
            seed=seed,
        )
        text = answer.choices[0].message.content
        self.report("draft", answer.usage, repr(text))
        return text

    def ask(self, question: str) -> str:
        """Answer a task."""
        self.messages.append({"role": "user", "content": question})
        num_drafts = self.max_drafts if self.call("uncertainty") < 0.8 else 1
        best, highest = "", -1.0
        for seed in range(num_drafts):
            text = self.draft(seed)
            score = self.call("check", {"role": "assistant", "content": text})
            if score > highest:
                best, highest = text, score
            if score >= 0.5:
                break
        return self.say(best if highest >= 0.5 else f"I am not sure of this: {best}")

    def read(self, text: str) -> None:
        """Take a text into the conversation, for questions about it."""
        self.messages.append({"role": "user", "content": f"Please read this first.\n\n{text}"})
        self.say("I have read it. What would you like to know?")

    def ask_about(self, question: str) -> str:
        """Answer from what was read, or say that it does not say."""
        self.messages.append({"role": "user", "content": question})
        if self.call("answerability") < 0.5:
            return self.say("The text does not say.")
        return self.say(self.draft(seed=0))

    def say(self, text: str) -> str:
        self.messages.append({"role": "assistant", "content": text})
        return text

    def report(self, what: str, usage: openai.types.CompletionUsage, result: str) -> None:
        reused = usage.prompt_tokens_details.cached_tokens
        print(f"  {what:>13}  {reused:4} of {usage.prompt_tokens:4} prompt tokens reused  {result}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", required=True, help="the bank's name, as the server has it; see docs/functions.md")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a draft")
    options = parser.parse_args(arguments)
    with openai.OpenAI(base_url=options.url, api_key=options.api_key) as client:
        agent = Agent(client, options.bank, max_tokens=options.max_tokens)
        agent.read(NOTE)
        for question in QUESTIONS:
            print(question)
            print(agent.ask_about(question))
        for question in TASKS:
            print(question)
            print(agent.ask(question))


if __name__ == "__main__":
    main()
