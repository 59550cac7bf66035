"""Chat templates render as transformers does, and the ones that do not end are ended."""

import multiprocessing
import os
import signal
import threading
import time
from itertools import pairwise

import pytest

from molora import chat_template
from molora.activation import render
from molora.chat_template import TemplateLimitError, apply_chat_template
from molora.tiny import byte_tokenizer

USER = {"role": "user", "content": "Hé, ✓ <b>\x00\n\t\"quoted\" 'and' \\ \u2028 \ud83d you!"}
PLAIN = {"role": "user", "content": "Hé"}
SYSTEM = {"role": "system", "content": " Be brief. "}
ANSWER = {"role": "assistant", "content": "😀 Hm. "}
TEMPLATES = {
    "chatml": byte_tokenizer().chat_template,
    "json": "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ eos_token }}",
    "blocks": """
        {%- set ns = namespace(n=0) %}
        {%- macro say(m) %}<{{ m.role }}>{{ m['content'] | trim }}{% endmacro %}
        {%- for m in messages %}
            {%- if m.role == 'system' %}{% continue %}{% endif %}
            {%- set ns.n = ns.n + 1 %}
            {{- say(m) ~ ns.n }}
        {%- endfor %}
        {%- if tools is defined and tools %}tools{% endif %}
        {%- if add_generation_prompt %}<assistant>{% endif %}""",
    "date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ '%-9s|' % m.role }}{{ m.content[:2] }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "unknown": "{{ nothing }}{{ messages[0].nothing }}|",
}

HUGE = 10**12
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (7 ** (7 ** 9)) % 2 }}",
    "a constant": "{% if 9 ** (9 ** 9) > 1 %}1{% endif %}",
    "sums": "{{ range(99999) | map('string') | batch(1) | sum(start=[]) | sum(start=[]) | length }}",
}
GREEDY = {
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a product": f"{{{{ messages[0].role * {HUGE} }}}}",
    "a constant": f"{{{{ 'x' * {HUGE} }}}}",
    "a list": f"{{{{ [0] * {HUGE} }}}}",
    "padding": f"{{{{ 'x'.ljust({HUGE}) }}}}",
    "a filter": f"{{{{ 'x' | center({HUGE}) }}}}",
    "a format": f"{{{{ '%{HUGE}d' % 1 }}}}",
    "another": f"{{{{ '{{:{HUGE}}}'.format(1) }}}}",
    "bytes": f"{{{{ (1).to_bytes({HUGE}) }}}}",
}
FAILING = {
    "a refusal": ("{{ raise_exception('Roles must alternate') }}", "these messages: Roles must alternate"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "arithmetic": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nesting": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "Error"),
    "the inside": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "a long text": ("{{ 'ab' * 9000000 }}", "18000000 characters of them, more than 16777216"),
}


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_it_is_what_transformers_renders(template, messages, add_generation_prompt):
    tokenizer, options = with_template(template), {"add_generation_prompt": add_generation_prompt}
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert apply_chat_template(tokenizer, messages, **options) == expected


def test_an_answer_that_goes_on():
    tokenizer, messages = byte_tokenizer(), [USER, ANSWER]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert apply_chat_template(tokenizer, messages, continue_final_message=True) == expected


def test_one_of_several_templates():
    tokenizer = with_template({"default": "one", "other": "two"})
    assert apply_chat_template(tokenizer, [USER]) == "one"
    with pytest.raises(ValueError, match="multiple chat templates"):
        apply_chat_template(with_template({"some": "one", "other": "two"}), [USER])


def test_it_costs_less_than_a_millisecond():
    tokenizer = byte_tokenizer()
    apply_chat_template(tokenizer, [USER])
    times = [time.perf_counter() for _ in range(201) if apply_chat_template(tokenizer, [USER])]
    assert sorted(later - before for before, later in pairwise(times))[20] < 1e-3


@pytest.fixture
def limited(monkeypatch):
    """A process of its own that computes for some seconds at most."""
    monkeypatch.setattr(chat_template, "_renderer", renderer := chat_template._Renderer())

    def limit(seconds):
        monkeypatch.setattr(chat_template, "TIME_LIMIT_S", seconds)
        return renderer

    yield limit
    renderer.end()


@pytest.fixture
def short(limited):
    return limited(0.5)


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(short, template):
    begun = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"does not end within 0\.5 s on these messages; send others"):
        render(with_template(template), [SYSTEM, PLAIN, ANSWER, PLAIN])
    assert time.monotonic() - begun < 20
    assert short._process is None
    assert apply_chat_template(byte_tokenizer(), [USER]).endswith("<|im_end|>\n")


def test_one_that_ends_only_on_the_whole_conversation(short):
    """Its activation points are found on parts of it."""
    template = ENDLESS["loops"].join(("{% if not add_generation_prompt %}", "{% endif %}x"))
    begun = time.monotonic()
    with pytest.raises(TemplateLimitError):
        render(with_template(template), [SYSTEM, PLAIN, ANSWER, PLAIN])
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_template_that_fills_the_memory_may_not(limited, template):
    limited(60)  # so that a slow machine too meets the limit of memory first
    with pytest.raises(ValueError, match=r"more memory than a template may|MemoryError|OverflowError"):
        render(with_template(template), [PLAIN])


@pytest.mark.parametrize(("template", "words"), FAILING.values(), ids=FAILING)
def test_a_template_that_fails_says_why(template, words):
    with pytest.raises(ValueError, match=words) as caught:
        render(with_template(template), [PLAIN])
    assert len(str(caught.value)) < 600


def test_a_process_that_was_killed_is_started_again(short):
    tokenizer = byte_tokenizer()
    expected = apply_chat_template(tokenizer, [USER])
    os.kill(short._process.pid, signal.SIGKILL)
    short._process.wait()
    with pytest.raises(TemplateLimitError, match="ended the process that renders it"):
        apply_chat_template(tokenizer, [USER])
    assert apply_chat_template(tokenizer, [USER]) == expected


def test_threads_get_their_own_answers():
    tokenizer, wrong = byte_tokenizer(), []

    def ask(name):
        for number in range(50):
            text = apply_chat_template(tokenizer, [{"role": "user", "content": f"{name} {number}"}])
            if f"user\n{name} {number}<" not in text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _pid(_):
    apply_chat_template(byte_tokenizer(), [USER])
    return chat_template._renderer._process.pid


def test_a_fork_has_a_process_of_its_own():
    pids = {_pid(0)}
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pids |= {*pool.map(_pid, range(2))}
    assert len(pids) == 2
    assert _pid(0) in pids
