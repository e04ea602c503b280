"""别人写的模板：文字与 transformers 渲染的相同，时间与内存都有界，拒绝是一行。"""

import os
import time
from datetime import date

import families
import pytest

from distillab.data import rendering
from distillab.data.rendering import Request, render_ahead, rendered
from distillab.errors import DistillabError

MESSAGES = [
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris. 巴黎 🙂"},
]
WHOLE = [(2, False)]


def text(template, messages=MESSAGES, today=None, **variables):
    (found,) = rendered(
        template, Request(messages, [(len(messages), False)], variables, today=today)
    )
    assert found.error is None, found.error
    return found.text


@pytest.mark.parametrize("name", [*families.FAMILIES, *families.MORE])
def test_the_text_is_that_of_transformers(name):
    tokenizer = families.tokenizer_of(name)
    request = Request(MESSAGES, [(1, True), (2, False)], tokenizer.special_tokens_map)
    prompt, whole = rendered(tokenizer.chat_template, request)
    assert prompt.text == tokenizer.apply_chat_template(
        MESSAGES[:1], tokenize=False, add_generation_prompt=True
    )
    assert whole.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
             "{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "filler text": "{{ lipsum(n=10000000) }}",
    "repeated": "{{ 'a' * 3000000000 }}",
    "when rendered": "{{ messages[0].content * 300000000 }}",
    "doubled": "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padded": "{{ '%3000000000d' % 1 }}",
    "centred": "{{ 'a'|center(3000000000) }}",
    "written out": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
                   "{% endfor %}{% endfor %}",
    "long": "{{ 'a' * 99000000 }}",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_takes_too_much_is_stopped_in_one_line(monkeypatch, kind):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    with pytest.raises(
        DistillabError, match=r"^the chat template was stopped: it (took more than |writes )"
    ) as caught:
        text(HOSTILE[kind])
    assert "\n" not in str(caught.value)
    assert text("{{ messages[0].content }}") == "The capital of France?"


def test_the_bound_holds_for_each_conversation_and_not_only_for_the_first(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    template = "{% for a in range(messages[0].content|int) %}{% for b in range(99999) %}{% endfor %}{% endfor %}ok"
    few, many = ([{"role": "user", "content": str(n)}] for n in (1, 99999))
    assert text(template, few) == "ok"
    with pytest.raises(DistillabError, match=r"it took more than 0\.2 s"):
        text(template, many)
    requests = [Request(messages, [(1, False)], {}) for messages in (few, many, few)]
    render_ahead(template, requests)  # 先渲染的一批里有它也一样，其余的照常
    assert rendered(template, requests[0])[0].text == "ok"
    with pytest.raises(DistillabError, match=r"it took more than 0\.2 s"):
        rendered(template, requests[1])
    assert rendered(template, requests[2])[0].text == "ok"


def test_long_conversations_are_rendered_within_the_bounds():
    content = "知识蒸馏 " * 400_000
    assert len(text("{{ messages[0].content }}", [{"role": "user", "content": content}])) == len(
        content
    )


def test_what_is_rendered_ahead_is_what_is_rendered():
    requests = [Request(MESSAGES[:n], [(n, False)], {"a": n}) for n in (1, 2)]
    alone = [rendered("{{ messages|length }} {{ a }}", request) for request in requests]
    render_ahead("{{ messages|length }} {{ a }}", requests)
    assert [rendered("{{ messages|length }} {{ a }}", request) for request in requests] == alone
    assert [found.text for (found,) in alone] == ["1 1", "2 2"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['nope']['x'] }}", "'dict object' has no attribute 'nope'"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ 1 / (messages|length - 2) }}", "division by zero"),
        ("{{ range(1000000) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply"),
        (
            "{{ ''.__class__.__mro__ }}",
            "access to attribute '__class__' of 'str' object is unsafe.",
        ),
    ],
)
def test_a_refusal_is_one_line_of_the_template_or_its_error(template, reason):
    (found,) = rendered(template, Request(MESSAGES, WHOLE, {}))
    assert found.error is not None
    assert found.error.startswith(reason)
    assert "\n" not in found.error


def test_one_refusal_leaves_the_others():
    template = "{% if messages|length == 1 %}{{ raise_exception('no') }}{% endif %}ok"
    first, second = rendered(template, Request(MESSAGES, [(1, False), (2, False)], {}))
    assert (first.error, second.text) == ("no", "ok")


def test_the_date_is_the_one_given_and_today_otherwise():
    template = "{{ strftime_now('%d %b %Y') }}"
    assert text(template, today=date(2024, 7, 26)) == "26 Jul 2024"
    assert text(template) == date.today().strftime("%d %b %Y")


def test_an_interruption_leaves_no_answer_for_the_next_question(monkeypatch):
    def interrupted(child, line):
        child.stdin.write(line)
        child.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering._process, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text("first")
    assert text("second") == "second"


def test_a_forked_process_renders_by_itself():
    assert text("here") == "here"
    child = os.fork()
    if not child:
        os._exit(0 if text("there") == "there" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert text("here again") == "here again"


def test_a_fault_of_our_own_shows_its_traceback():
    with pytest.raises(RuntimeError, match="Traceback"):
        rendered("x", Request(MESSAGES, [("one", False)], {}))
    started = time.perf_counter()
    assert text("x") == "x"
    assert time.perf_counter() - started < 5
