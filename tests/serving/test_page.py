"""The page in a real headless Chromium, against a server that plays scripted answers in the wire format."""

import asyncio
import json
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from molora import MoLoRA
from molora.serving.app import create_app
from molora.serving.config import ServeConfig
from molora.serving.engine import Engine
from molora.serving.page import add_page

pytest.importorskip("selenium", reason="the page is driven by selenium, of the test extra")
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="the page needs chromium and chromedriver (apt install chromium chromium-driver)"
)

BASE = "org/Base-1B"
ADAPTERS = ("sums", "words", "family", "sorting", "legs", "law", "code", "maths", "ninth")
ROUTED = (
    ("Two", [], ("base", "sums")),
    (" plus", [("sums", 1.0)], ("sums", "base")),
    (" two", [("sums", 1.0)], ("sums", "words")),
    ("", [("sums", 1.0)], ("sums", "words")),
    (" ✓.", [("words", 0.75), ("sums", 0.25)], ("words", "sums")),
    (" Done.", [], ("base", "words")),
    ("", [], ("base", "words")),
)
"""The text of each token, its route, and the router's candidates."""


# The server


@dataclass
class Reply:
    """What the server answers to one request."""

    tokens: Sequence[tuple[str, list[tuple[str, float]], Sequence[str]]] = ROUTED
    num_prompt_tokens: int = 40
    num_cached_tokens: int = 10
    finish_reason: str = "stop"
    has_logprobs: bool = True
    holds_after: int | None = None  # tokens, after which it waits until the client leaves
    breaks_after: int | None = None  # tokens, after which the connection is lost
    fails_after: int | None = None  # tokens, after which the stream says that the server failed
    error: tuple[int, str, dict[str, str]] | None = None  # status, message, headers


@dataclass
class FakeServer:
    adapters: Sequence[str] = ADAPTERS
    replies: list[Reply] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    client_left: threading.Event = field(default_factory=threading.Event)

    def app(self) -> FastAPI:
        app = FastAPI()
        add_page(app)

        @app.get("/v1/models", response_model=None)
        async def models(request: Request) -> Response | dict[str, Any]:
            if not self.allows(request):
                return error(401, "Incorrect API key provided")
            names = [("bank", "bank", BASE), (BASE, BASE, None)]
            names += [(f"bank:{name}", name, BASE) for name in self.adapters]
            return {"object": "list", "data": [{"id": id, "root": root, "parent": up} for id, root, up in names]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if not self.allows(request):
                return error(401, "Incorrect API key provided")
            question = await request.json()
            self.questions.append(question)
            reply = self.replies.pop(0) if self.replies else Reply()
            if reply.error is not None:
                return error(*reply.error)
            return StreamingResponse(self.events(question, reply), media_type="text/event-stream")

        return app

    def allows(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def events(self, question: dict[str, Any], reply: Reply) -> AsyncIterator[str]:
        def event(**fields: Any) -> str:
            head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": question["model"]}
            return f"data: {json.dumps(head | fields)}\n\n"

        yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for position, (text, route, candidates) in enumerate(reply.tokens):
            if position == reply.holds_after:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.client_left.set()
            if position == reply.breaks_after:
                raise ConnectionError("the test breaks the connection")
            if position == reply.fails_after:
                yield f"data: {json.dumps({'error': {'message': 'out of memory', 'type': 'server_error'}})}\n\n"
                return
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            if reply.has_logprobs:
                candidate_pairs = list(zip(candidates, (0.85, 0.1), strict=False))
                entry = {"token": text, "bytes": list(text.encode()), "logprob": -0.25, "top_logprobs": []}
                entry["route"] = {"adapters": route, "candidates": candidate_pairs}
                choice["logprobs"] = {"content": [entry]}
            yield event(choices=[choice], molora={"route": route})
            await asyncio.sleep(0.002)
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}])
        usage = {"prompt_tokens": reply.num_prompt_tokens, "completion_tokens": len(reply.tokens)}
        usage |= {"total_tokens": sum(usage.values())}
        usage |= {"prompt_tokens_details": {"cached_tokens": reply.num_cached_tokens}}
        yield event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Serve the app on a free port; yields the page's address."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline_s = time.monotonic() + 10
    while not running.started and time.monotonic() < deadline_s:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


# The browser


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as its reader uses it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        self.url = url
        self.expected: set[str] = set()
        """Failures of requests that the browser itself reports in the console."""

    def open(self) -> None:
        self.browser.get(self.url)
        self.wait(lambda: self.all("#model option"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 10, 0.02).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def choose(self, model: str) -> None:
        Select(self.one("#model")).select_by_value(model)

    def send(self, message: str) -> None:
        self.one("#message").send_keys(message, Keys.ENTER)

    def ask(self, message: str) -> WebElement:
        """The turn, once it is over."""
        self.send(message)
        self.wait(lambda: self.one("#send").text == "Send")
        return self.all(".turn")[-1]

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element

    def emulate(self, *, theme: str = "light", motion: str = "no-preference") -> None:
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def check_console_and_network(self) -> None:
        for entry in self.browser.get_log("browser"):
            assert any(text in entry["message"] for text in self.expected), entry
        for entry in self.browser.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                assert url.startswith((self.url, "data:", "about:")), url


@contextmanager
def open_page(browser: webdriver.Chrome, app: FastAPI, *, opens: bool = True) -> Iterator[Page]:
    """A page of its own port, and so an origin with nothing stored; checked at the end."""
    with serve(app) as url:
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        page = Page(browser, url)
        page.emulate()
        page.resize(1000, 800)
        if opens:
            page.open()
        yield page
        page.check_console_and_network()


@pytest.fixture
def page(browser: webdriver.Chrome, server: FakeServer) -> Iterator[Page]:
    with open_page(browser, server.app()) as page:
        yield page


def texts(elements: Sequence[WebElement]) -> list[str]:
    return [element.get_property("textContent") for element in elements]


def parts(element: WebElement, selector: str) -> list[WebElement]:
    return element.find_elements(By.CSS_SELECTOR, selector)


def part(element: WebElement, selector: str) -> WebElement:
    return element.find_element(By.CSS_SELECTOR, selector)


# The tests


def test_at_first_it_says_what_it_is_and_offers_examples(page: Page, server: FakeServer) -> None:
    assert "router" in page.one("#empty h2").text
    assert page.one("#served").text == f"Base-1B, {len(ADAPTERS)} adapters"
    assert [group.get_attribute("label") for group in page.all("#model optgroup")] == ["Router", "Base", "Adapters"]
    assert texts(page.all("#model option")) == ["bank (router)", "Base-1B (base)", *ADAPTERS]
    assert page.focused().get_attribute("id") == "message"
    examples = page.all("#examples button")
    assert len(examples) == 3
    prompt = part(examples[1], "span").get_property("textContent")
    examples[1].click()
    page.wait(lambda: server.questions)
    assert server.questions[0]["messages"] == [{"role": "user", "content": prompt}]
    assert not page.one("#empty").is_displayed()


def test_the_examples_suit_the_demo_bank_where_it_is_served(page: Page, server: FakeServer) -> None:
    server.adapters = ("arithmetic", "words", "family", "sorting", "legs")
    page.open()
    assert [part(button, "strong").text for button in page.all("#examples button")] == [
        "Two tasks in one message",
        "A sum",
        "Who is who in a family",
    ]


def test_an_answer_is_coloured_by_who_wrote_it(page: Page, server: FakeServer) -> None:
    turn = page.ask("What is two plus two?")
    assert server.questions == [
        {
            "model": "bank",
            "messages": [{"role": "user", "content": "What is two plus two?"}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 0,
            "return_routes": True,
        }
    ]
    assert part(turn, ".prompt").text == "What is two plus two?"
    assert texts([part(turn, ".answer")]) == ["Two plus two ✓. Done."]
    runs = [(run.get_attribute("data-writer"), run.get_property("textContent")) for run in parts(turn, ".run")]
    assert runs == [("base", "Two"), ("sums", "plus two"), ("words", "✓."), ("base", "Done.")]
    assert texts(parts(turn, ".legend li")) == ["base3", "Ssums3", "Wwords1"]
    assert texts(parts(turn, ".cache span")) == ["10 cached", "30 computed"]
    assert re.fullmatch(r"\d+ ms", part(turn, ".first-token").text)
    assert re.fullmatch(r"[\d,.]+ tokens/s", part(turn, ".speed").text)


def test_each_adapter_looks_different_and_not_by_colour_alone(page: Page, server: FakeServer) -> None:
    server.replies = [Reply([(f" {name}", [(name, 1.0)], ()) for name in ADAPTERS])]
    page.ask("Everyone, please.")
    looks = page.script(
        """return [...document.querySelectorAll(".run")].map((run) => {
             const { backgroundColor, borderBottomStyle } = getComputedStyle(run);
             return [backgroundColor, borderBottomStyle, run.dataset.mark];
           });"""
    )
    assert len({(colour, line) for colour, line, _ in looks}) == len({mark for *_, mark in looks}) == len(ADAPTERS)
    assert len({line for _, line, _ in looks}) == 4


MARKS = """
  return [...document.querySelectorAll(".run[data-mark]:not(.base)")].map((run) => {
    const [box] = run.getClientRects();
    const mark = getComputedStyle(run, "::before");
    const [left, top] = [box.left + parseFloat(mark.left), box.top + parseFloat(mark.top)];
    return { left, top, right: left + parseFloat(mark.width), bottom: top + parseFloat(mark.height), text: box.top };
  });
"""


@pytest.mark.parametrize("width", [1000, 360])
def test_the_letters_over_short_tokens_keep_apart(page: Page, server: FakeServer, width: int) -> None:
    """Forty adapters, so that some of the marks are numbers of two digits."""
    page.resize(width, 740)
    texts = [".", "i", ",", "l", "'", "1", ":", "|", "W", "ll"]
    adapters = [f"{letter}{number}" for number in range(10) for letter in "wmxo"]
    server.replies = [
        Reply([(texts[n % len(texts)], [(adapter, 1.0)], ()) for n, adapter in enumerate(3 * adapters)]),
        Reply([("Four", [("w0", 1.0)], ()), (".", [("m0", 1.0)], ()), ("00", [("m0", 1.0)], ())]),
    ]
    page.ask("Everyone, please.")
    marks = page.script(MARKS)
    assert len(marks) == 3 * len(adapters)
    lines = [(here, after) for here, after in pairwise(marks) if here["top"] == after["top"]]
    assert len(lines) > len(adapters)
    assert [(here, after) for here, after in lines if here["right"] + 0.5 > after["left"]] == []
    assert [mark for mark in marks if mark["bottom"] > mark["text"] + 3] == []

    turn = page.ask("And of tokens that are not short?")
    assert parts(turn, ".run.narrow") == []


def test_without_logprobs_the_chunks_own_route_colours(page: Page, server: FakeServer) -> None:
    server.replies = [Reply(has_logprobs=False)]
    turn = page.ask("What is two plus two?")
    assert texts(parts(turn, ".legend li")) == ["base3", "Ssums3", "Wwords1"]


def test_keyboard_focus_shows_a_tokens_details(page: Page) -> None:
    page.ask("What is two plus two?")
    shift_tabs = ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB, Keys.TAB).key_up(Keys.SHIFT)
    shift_tabs.perform()  # past the copy button, into the answer
    assert page.focused().text == "Two"
    page.press(Keys.ARROW_RIGHT)
    assert page.focused().text == "plus"
    details = page.one("#details")
    assert details.is_displayed()
    assert page.focused().get_attribute("aria-describedby") == "details"
    assert texts(parts(details, "dt, dd")) == ["Gate", "1.00", "Log-probability", "\u22120.25 (78%)"]
    assert texts(parts(details, ".candidates .name, .candidates .number")) == ["sums", "85%", "base", "10%"]
    page.press(Keys.ARROW_DOWN)
    assert page.focused().text == "✓."
    assert texts(parts(details, "dt, dd"))[:4] == ["Gate of words", "0.75", "Gate of sums", "0.25"]
    assert "last of 2 tokens" in details.text
    page.press(Keys.ARROW_UP, Keys.ARROW_UP)
    assert page.focused().text == "Two"
    page.press(Keys.END)
    assert page.focused().text == "Done."
    page.press(Keys.TAB)
    assert not details.is_displayed()


def test_the_pointer_shows_a_tokens_details(page: Page) -> None:
    turn = page.ask("What is two plus two?")
    ActionChains(page.browser).move_to_element(parts(turn, ".token")[1]).perform()
    details = page.one("#details")
    page.wait(details.is_displayed)
    assert details.text.startswith("S\nsums")
    ActionChains(page.browser).move_to_element(details).pause(0.3).perform()
    assert details.is_displayed()
    ActionChains(page.browser).move_to_element(page.one("h1")).perform()
    page.wait(lambda: not details.is_displayed())


def test_another_adapter_continues_the_conversation_and_the_bar_shows_reuse(page: Page, server: FakeServer) -> None:
    server.replies = [
        Reply([("Four.", [], ())], num_prompt_tokens=40, num_cached_tokens=0),
        Reply([("4", [("sums", 1.0)], ())], num_prompt_tokens=60, num_cached_tokens=45),
    ]
    page.choose(BASE)
    first = page.ask("What is two plus two?")
    page.choose("bank:sums")
    second = page.ask("As a number?")
    assert [question["model"] for question in server.questions] == [BASE, "bank:sums"]
    assert server.questions[1]["messages"] == [
        {"role": "user", "content": "What is two plus two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "As a number?"},
    ]
    shares = [part(turn, ".meter span").size["width"] / part(turn, ".meter").size["width"] for turn in (first, second)]
    assert shares == [pytest.approx(0, abs=0.01), pytest.approx(0.75, abs=0.01)]
    assert texts(parts(second, ".cache span")) == ["45 cached", "15 computed"]
    assert part(second, ".who").text.split() == ["S", "sums", "adapter"]


def test_options_are_sent_and_wrong_ones_are_not(page: Page, server: FakeServer) -> None:
    page.one("#options-toggle").click()
    assert page.one("#options-toggle").get_attribute("aria-expanded") == "true"
    Select(page.one("#activation")).select_by_value("response")
    page.one("#temperature").send_keys(Keys.CONTROL, "a", Keys.NULL, "9")
    page.one("#max-tokens").send_keys("7")
    page.send("Hello")
    assert page.focused().get_attribute("id") == "temperature"
    assert server.questions == []
    page.one("#temperature").send_keys(Keys.CONTROL, "a", Keys.NULL, "0.5")
    server.replies = [Reply(finish_reason="length")]
    turn = page.ask("")
    question = server.questions[0]
    assert question["messages"][0]["content"] == "Hello"
    assert (question["activation"], question["temperature"], question["max_completion_tokens"]) == ("response", 0.5, 7)
    assert part(turn, ".note").text == "Ended at the most tokens allowed, after 7."


def test_shift_enter_starts_a_line(page: Page, server: FakeServer) -> None:
    page.one("#message").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    page.ask("")
    assert server.questions[0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_was_written(page: Page, server: FakeServer, way: str) -> None:
    server.replies = [Reply(holds_after=3)]
    page.send("What is two plus two?")
    page.wait(lambda: len(page.all(".token")) == 3)
    assert page.one("#send").text == "Stop"
    assert page.one(".answer").get_attribute("aria-busy") == "true"
    if way == "button":
        page.one("#send").click()
    else:
        page.press(Keys.ESCAPE)
    assert server.client_left.wait(10)
    page.wait(lambda: page.one("#send").text == "Send")
    assert page.one(".note").text == "You stopped this answer after 3 tokens."
    assert page.focused().get_attribute("id") == "message"
    page.ask("Go on.")
    assert server.questions[1]["messages"][1] == {"role": "assistant", "content": "Two plus two"}


def test_a_stopped_answer_shows_what_is_known_of_it(page: Page, server: FakeServer) -> None:
    server.replies = [Reply(holds_after=5), Reply(holds_after=0)]
    page.send("What is two plus two?")
    page.wait(lambda: texts(page.all(".legend .count")) == ["1", "3", "1"])
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.one("#send").text == "Send")
    turn = page.one(".turn")
    assert part(turn, ".note").text == "You stopped this answer after 5 tokens."
    assert texts(parts(turn, ".legend li")) == ["base1", "Ssums3", "Wwords1"]
    shown = [figure.text for figure in parts(turn, "dt") if figure.is_displayed()]
    assert shown == ["Prompt tokens", "First token", "Speed"]
    assert part(turn, ".cache").text == "reported only at the end"
    assert not part(turn, ".meter").is_displayed()

    page.send("And now?")
    page.wait(lambda: len(server.questions) == 2)
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.one("#send").text == "Send")
    assert part(page.all(".turn")[-1], ".note").text == "You stopped this answer before its first token."


@pytest.mark.parametrize(
    ("reply", "status", "message"),
    [
        (Reply(error=(429, "full", {"Retry-After": "7"})), 429, "The server has too much to do; try again in 7 s."),
        (Reply(error=(400, "the prompt is too long", {})), 400, "The server refused this: the prompt is too long"),
        (Reply(breaks_after=2), None, "The connection was lost before the answer was complete."),
        (Reply(fails_after=2), None, "The server failed: out of memory"),
    ],
    ids=["full", "refused", "lost", "failed"],
)
def test_an_error_is_shown_and_can_be_tried_again(
    page: Page, server: FakeServer, reply: Reply, status: int | None, message: str
) -> None:
    page.expected = {f"status of {status}" if status else "ERR_INCOMPLETE_CHUNKED_ENCODING"}
    server.replies = [reply]
    turn = page.ask("What is two plus two?")
    assert part(turn, ".notice p").text == message
    assert message in page.one("#announcer").get_property("textContent")
    page.choose("bank:sums")
    part(turn, ".notice button").click()
    page.wait(lambda: page.all(".legend .count") and page.one("#send").text == "Send")
    assert len(page.all(".turn")) == 1
    assert [question["model"] for question in server.questions] == ["bank", "bank:sums"]
    assert len(server.questions[1]["messages"]) == 1


def test_a_failed_turn_is_left_out_once_the_conversation_goes_on(page: Page, server: FakeServer) -> None:
    page.expected = {"status of 500"}
    server.replies = [Reply(error=(500, "broken", {}))]
    failed = page.ask("One?")
    page.ask("Two?")
    assert server.questions[1]["messages"] == [{"role": "user", "content": "Two?"}]
    assert part(failed, ".note").text == "This turn is left out of the conversation."
    assert not part(failed, ".notice button").is_displayed()


def test_a_key_is_asked_for_where_the_server_wants_one(page: Page, server: FakeServer) -> None:
    page.expected = {"status of 401"}
    server.key = "secret"
    failed = page.ask("What is two plus two?")
    assert part(failed, ".notice p").text == "Incorrect API key provided"
    assert page.focused().get_attribute("id") == "key"
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: "does not accept" in page.one("#key-form label").text)
    page.one("#key").send_keys("secret", Keys.ENTER)
    page.wait(lambda: page.all(".legend .count") and page.one("#send").text == "Send")
    assert not page.one("#key-form").is_displayed()
    assert len(page.all(".turn")) == 1
    assert page.script("return [localStorage.length, Object.values(sessionStorage)]") == [0, ["secret"]]
    page.open()  # the models are listed with it too
    assert not page.one("#key-form").is_displayed()


def test_a_server_that_cannot_be_reached_at_first_can_be_tried_again(page: Page) -> None:
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/models"]})
    page.browser.get(page.url)
    page.wait(page.one("#models-failed").is_displayed)
    assert "cannot be reached" in page.one("#models-failed p").text
    page.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.browser.get_log("browser")
    page.one("#models-failed button").click()
    page.wait(lambda: page.all("#model option"))


def test_markup_is_only_ever_text(page: Page, server: FakeServer) -> None:
    attack = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    server.replies = [
        Reply([(attack, [(attack, 1.0)], (attack,))]),
        Reply(error=(400, attack, {})),
    ]
    page.expected = {"status of 400"}
    turn = page.ask(attack)
    parts(turn, ".token")[0].click()
    assert part(turn, ".answer").text == attack
    assert part(turn, ".prompt").text == attack
    assert attack in page.one("#details").text
    assert attack in part(page.ask("again"), ".notice p").text
    assert page.browser.title == "MoLoRA"
    assert page.all("main img, main script, #details img") == []


def test_a_new_conversation_forgets_the_old_one_and_stops_its_answer(page: Page, server: FakeServer) -> None:
    page.ask("One?")
    server.replies = [Reply(holds_after=2)]
    page.send("Two?")
    page.wait(lambda: len(page.all(".turn")[-1].find_elements(By.CSS_SELECTOR, ".token")) == 2)
    page.one("#new").click()
    assert server.client_left.wait(10)
    assert page.all(".turn") == []
    assert page.one("#empty").is_displayed()
    page.ask("Three?")
    assert server.questions[2]["messages"] == [{"role": "user", "content": "Three?"}]
    assert "Stopped" not in page.one("#announcer").get_property("textContent")


def test_an_answer_can_be_copied(page: Page) -> None:
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
    turn = page.ask("What is two plus two?")
    part(turn, ".copy").click()
    page.wait(lambda: part(turn, ".copy").text == "Copied")
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done);"
    assert page.browser.execute_async_script(read) == "Two plus two ✓. Done."


def test_a_screen_reader_hears_sentences(page: Page) -> None:
    page.ask("What is two plus two?")
    region = page.one("#announcer")
    assert region.get_attribute("aria-live") == "polite"
    assert texts(parts(region, "p")) == ["Two plus two ✓.", "Done.", "End of the answer."]


def test_the_theme_follows_the_system_until_one_is_chosen(page: Page) -> None:
    def lightness() -> float:
        return page.script(PIXELS + "return pixel(getComputedStyle(document.body).backgroundColor)[0]") / 255

    button = page.one("#theme")
    assert lightness() > 0.9
    page.emulate(theme="dark")
    assert lightness() < 0.2
    page.wait(lambda: button.get_attribute("aria-label") == "Use the light theme")
    button.click()
    assert lightness() > 0.9
    page.open()
    assert lightness() > 0.9
    page.one("#theme").click()  # the system's again
    page.emulate(theme="light")
    assert lightness() > 0.9


PIXELS = """
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    const colours = [];
    for (let e = element; e; e = e.parentElement) colours.unshift(getComputedStyle(e).backgroundColor);
    return colours;
  };
"""
CONTRASTS = """
  const marked = [...document.querySelectorAll(".run[data-mark]:not(.base)")];
  const words = [...document.querySelectorAll("body *:not(option, optgroup, template, script)")].filter(
    (e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const texts = words.map((e) => [contrast(pixel(...behind(e), getComputedStyle(e).color), pixel(...behind(e))), e]);
  const marks = marked.map((e) => {
    const colour = getComputedStyle(e, "::before").color;
    return [contrast(pixel(...behind(e.parentElement), colour), pixel(...behind(e.parentElement))), e];
  });
  const lines = marked.map((e) => {
    const colour = getComputedStyle(e).borderBottomColor;
    return [contrast(pixel(...behind(e.parentElement), colour), pixel(...behind(e.parentElement))), e];
  });
  const name = ([ratio, e]) => [ratio, `${e.tagName}.${e.className}: ${e.textContent}`];
  return { texts: texts.map(name), marks: marks.map(name), lines: lines.map(name) };
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough_in_both_themes(page: Page, server: FakeServer, theme: str) -> None:
    page.emulate(theme=theme)
    page.expected = {"status of 429"}
    server.replies = [
        Reply([("Base", [], ()), *((f" {name}", [(name, 1.0)], (name, "base")) for name in ADAPTERS)]),
        Reply(error=(429, "full", {})),
        Reply(error=(429, "full", {})),
    ]
    empty = page.script(PIXELS + CONTRASTS)
    page.one("#options-toggle").click()
    for message in ("Everyone, please.", "One more.", "And more."):
        page.ask(message)
    page.all(".token")[3].click()
    full = page.script(PIXELS + CONTRASTS)
    assert len(full["marks"]) == len(full["lines"]) == len(ADAPTERS)
    assert len(full["texts"]) > 50
    assert [text for text in (*empty["texts"], *full["texts"], *full["marks"]) if text[0] < 4.5] == []
    assert [line for line in full["lines"] if line[0] < 3] == []


CONTROLS = {"button", "textbox", "combobox", "spinbutton", "link", "listbox", "option", "group", "region", "image"}


@pytest.mark.parametrize("width", [1000, 360])
def test_the_page_can_be_used_without_seeing_it(page: Page, server: FakeServer, width: int) -> None:
    page.resize(width, 740)
    page.expected = {"status of 401"}
    server.replies = [Reply(), Reply(error=(401, "no", {}))]
    page.one("#options-toggle").click()
    for message in ("One?", "Two?"):
        page.ask(message)
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [
        (node["role"]["value"].lower(), node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]
    ]
    assert {"button", "textbox", "combobox", "spinbutton", "group", "heading", "main"} <= {role for role, _ in found}
    assert [role for role, name in found if role in CONTROLS and not name.strip()] == []
    assert len(page.all("h1")) == 1
    assert page.one("html").get_attribute("lang") == "en"
    ids = [element.get_attribute("id") for element in page.all("[id]")]
    assert len(ids) == len(set(ids))
    assert page.script("return document.documentElement.scrollWidth") <= width


def test_the_tab_key_goes_through_the_page_in_order(page: Page) -> None:
    page.ask("One?")
    page.script('document.querySelector(".skip").focus()')
    seen = []
    while "send" not in seen and len(seen) < 20:
        focused = page.focused()
        seen.append(focused.get_attribute("id") or focused.get_attribute("class").split()[0])
        outline = page.script(
            "const e = arguments[0]; return getComputedStyle(e.id === 'message' ? e.form : e).outlineStyle", focused
        )
        assert outline == "solid", seen[-1]
        page.press(Keys.TAB)
    assert seen == ["skip", "docs", "new", "theme", "token", "quiet", "message", "model", "options-toggle", "send"]


def test_nothing_moves_where_motion_is_unwanted(page: Page, server: FakeServer) -> None:
    server.replies = [Reply(holds_after=2)]
    page.send("One?")
    page.wait(lambda: len(page.all(".token")) == 2)
    animation = 'return getComputedStyle(document.querySelector(".answer"), "::after").animationName'
    assert page.script(animation) == "breathe"
    page.emulate(motion="reduce")
    assert page.script(animation) == "none"
    page.press(Keys.ESCAPE)


def test_the_answer_is_followed_until_the_reader_scrolls_away(page: Page, server: FakeServer) -> None:
    lines = [(f"line {number}\n", [("sums", 1.0)], ()) for number in range(100)]
    server.replies = [Reply(lines), Reply(lines, holds_after=50)]
    at_end = 'const m = document.querySelector("main"); return m.scrollHeight - m.scrollTop - m.clientHeight < 2'
    page.ask("Many lines, please.")
    assert page.script(at_end)
    page.send("More.")
    page.wait(lambda: len(page.all(".token")) == 150)
    assert page.script(at_end)
    ActionChains(page.browser).scroll_from_origin(ScrollOrigin.from_element(page.one("main")), 0, -500).perform()
    page.wait(lambda: not page.script(at_end))
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.one("#send").text == "Send")
    assert not page.script(at_end)


@pytest.mark.parametrize(("width", "height"), [(1000, 800), (390, 844)])
def test_what_opens_below_the_conversation_leaves_its_end_in_sight(
    page: Page, server: FakeServer, width: int, height: int
) -> None:
    page.resize(width, height)

    def is_in_sight(selector: str) -> bool:
        return page.script(
            """const [e, main] = [document.querySelector(arguments[0]), document.querySelector("main")];
               const [box, room] = [e.getBoundingClientRect(), main.getBoundingClientRect()];
               return room.top <= box.top && box.bottom <= room.bottom;""",
            selector,
        )

    page.one("#options-toggle").click()  # nothing to follow yet: the page stays at its top
    page.wait(page.one("#options").is_displayed)
    assert is_in_sight("#empty h2")
    page.one("#options-toggle").click()

    server.replies = [Reply([(f"line {number}\n", [("sums", 1.0)], ()) for number in range(30)])]
    page.ask("Many lines, please.")
    assert is_in_sight(".turn .figures")
    page.one("#options-toggle").click()
    page.wait(lambda: is_in_sight(".turn .figures"))
    page.one("#message").send_keys(*["line", Keys.SHIFT, Keys.ENTER, Keys.NULL] * 6)
    page.wait(lambda: is_in_sight(".turn .figures"))
    page.one("#options-toggle").click()

    frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));"
    page.browser.execute_async_script(frames)
    page.script('document.querySelector("main").scrollTop = 0')
    page.browser.execute_async_script(frames)
    page.one("#options-toggle").click()  # a reader who has scrolled away stays there
    page.browser.execute_async_script(frames)
    assert page.one("#options").is_displayed()
    assert is_in_sight(".turn .prompt")


def has_scrollbar(page: Page, selector: str) -> bool:
    return bool(
        page.script("const e = document.querySelector(arguments[0]); return e.scrollHeight > e.clientHeight", selector)
    )


def test_only_the_conversation_scrolls(page: Page, server: FakeServer) -> None:
    server.replies = [Reply([(f"line {number}\n", [("sums", 1.0)], ()) for number in range(100)])]
    page.ask("Many lines, please.")
    assert has_scrollbar(page, "main")
    assert not has_scrollbar(page, "html")
    assert not has_scrollbar(page, "body")


@pytest.fixture
def docs(browser: webdriver.Chrome, make_app: Callable[..., FastAPI]) -> Callable[..., AbstractContextManager[Page]]:
    @contextmanager
    def docs(**settings: Any) -> Iterator[Page]:
        with open_page(browser, make_app(**settings), opens=False) as page:
            browser.get(f"{page.url}docs")
            yield page

    return docs


def test_the_docs_describe_every_endpoint(docs: Callable[..., AbstractContextManager[Page]]) -> None:
    with docs() as page:
        page.wait(lambda: page.all("#schemas article"))
        described = page.browser.execute_async_script(
            "const done = arguments[0]; fetch('openapi.json').then((answer) => answer.json()).then(done)"
        )
        operations = [f"{method.upper()} {path}" for path, item in described["paths"].items() for method in item]
        assert "POST /v1/chat/completions" in operations
        assert sorted(texts(page.all("#operations h3"))) == sorted(operations)
        assert texts(page.all("#schemas h3")) == list(described["components"]["schemas"])
        targets = {each.get_attribute("href").partition("#")[2] for each in page.all('a[href*="#"]')}
        assert targets <= {each.get_attribute("id") for each in page.all("[id]")}
        (top_p,) = [row for row in page.all("#schema-ChatRequest tr") if part(row, "th").text == "top_p"]
        assert part(top_p, "td").text == "number (more than 0, at most 1); 1 if left out"
        page.one('#operations a[href="#schema-ChatRequest"]').click()
        assert page.script("return document.querySelector('main').scrollTop") > 500
        for selector in ("html", "body"):
            assert not has_scrollbar(page, selector)
        assert page.script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1000, 360])
def test_the_chat_leads_to_the_docs_and_stays(
    browser: webdriver.Chrome, docs: Callable[..., AbstractContextManager[Page]], width: int
) -> None:
    with docs(api_keys=("secret",)) as page:
        page.expected.add("401")
        page.resize(width, 740)
        page.script("sessionStorage.setItem('molora-api-key', 'secret')")
        page.open()
        link = page.one(".bar a")
        assert link.accessible_name == "API docs (opens a new tab)"
        page.all("#examples button")[0].click()
        chat = browser.current_window_handle
        link.click()
        page.wait(lambda: len(browser.window_handles) == 2)
        browser.switch_to.window(next(handle for handle in browser.window_handles if handle != chat))
        try:
            page.wait(lambda: page.all("#schemas article"))  # with the chat's key
            assert browser.current_url == f"{page.url}docs"
            page.one(".bar a").click()
            page.wait(lambda: browser.current_url == page.url)
        finally:
            browser.close()
            browser.switch_to.window(chat)
        assert len(page.all(".turn")) == 1


def test_the_docs_ask_for_a_key(docs: Callable[..., AbstractContextManager[Page]]) -> None:
    with docs(api_keys=("secret",)) as page:
        page.expected.add("401")
        page.wait(lambda: page.one("#key").is_displayed())
        page.one("#key").send_keys("secret", Keys.ENTER)
        page.wait(lambda: page.all("#schemas article"))
        assert not page.one("#key").is_displayed()


def test_a_real_bank_is_served(browser: webdriver.Chrome, m: MoLoRA) -> None:
    pytest.importorskip("molora.serving.sampling", reason="the page asks for log-probabilities")
    with (
        closing(Engine(m)) as engine,
        open_page(browser, create_app(engine, ServeConfig(bank=str(m.bank.path)))) as page,
    ):
        page.one("#options-toggle").click()
        page.one("#max-tokens").send_keys("12")
        routed = page.ask("What is two plus two?")
        counts = [int(count) for count in texts(parts(routed, ".legend .count"))]
        assert 1 <= sum(counts) <= 12
        parts(routed, ".token")[0].click()
        assert len(parts(page.one("#details"), ".candidates li")) == 2
        page.choose("tiny:x")
        named = page.ask("And in words?")
        assert texts(parts(named, ".legend li")) == ["Xx12"]
        cached, _ = texts(parts(named, ".cache span"))
        assert int(cached.split()[0]) > 0
