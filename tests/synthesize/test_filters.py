"""过滤：三种写法各留下什么，写错了在提问之前就说。"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillab.config.sections import FilterConfig
from distillab.errors import DistillabError
from distillab.synthesize.filters import make_filter, needs_answer, normalise


@pytest.fixture
def checks(tmp_path, monkeypatch) -> Iterator[Path]:
    """当前目录里使用者的模块；导入留下的痕迹在测试之后清掉。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "my_checks.py"
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("  Paris.\n", "paris", True),
        ("New\tYork !", "new york", True),
        ("STRASSE", "straße", True),
        ("北京。", "北京", True),
        ("42.", "42", True),
        ("50%", "50", False),
        ("f(x)", "f(x", False),
        ("-1", "1", False),
        ("3.14", "314", False),
    ],
)
def test_exact_ignores_case_spaces_and_final_punctuation_only(left, right, same):
    assert (normalise(left) == normalise(right)) is same
    assert make_filter(FilterConfig(exact=True))({}, right, left) is same


def test_without_a_filter_everything_is_kept():
    assert make_filter(None)({}, None, "anything")


def test_regex_takes_the_answer_literally_and_leaves_other_braces_alone():
    keep = make_filter(FilterConfig(regex=r"^the answer is {answer}[.!]{0,2}$"))
    assert keep({}, "3.14", "the answer is 3.14.")
    assert not keep({}, "3.14", "the answer is 3x14.")
    assert not keep({}, "3.14", "so the answer is 3.14")
    assert keep({}, "a+b (c) {2}", "the answer is a+b (c) {2}")


def test_regex_without_the_answer_needs_none():
    keep = make_filter(FilterConfig(regex=r"\d"))
    assert keep({}, None, "it is 7")
    assert not keep({}, None, "seven")


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (None, False),
        (FilterConfig(exact=True), True),
        (FilterConfig(regex="x{answer}"), True),
        (FilterConfig(regex="x"), False),
        (FilterConfig(function="a:b"), False),
    ],
)
def test_which_filters_need_an_answer(config, needed):
    assert needs_answer(config) is needed


def test_broken_regex_is_refused():
    with pytest.raises(DistillabError, match=r"^synthesize.filter.regex '\(\{answer\}' is not a"):
        make_filter(FilterConfig(regex="({answer}"))


def test_function_comes_from_the_current_directory_and_sees_record_and_response(checks):
    (checks.parent / "my_helper.py").write_text("LIMIT = 3\n")
    checks.write_text(
        "def short(record, response):\n"
        "    from my_helper import LIMIT\n"
        "    return len(response) < LIMIT and record['ok']\n"
    )
    keep = make_filter(FilterConfig(function="my_checks:short"))
    assert keep({"ok": True}, None, "ab") is True
    assert keep({"ok": True}, None, "abc") is False
    assert keep({"ok": False}, None, "ab") is False


def test_a_file_in_the_current_directory_does_not_shadow_libraries_afterwards(checks, monkeypatch):
    checks.write_text("def good(record, response): return True\n")
    (checks.parent / "colorsys.py").write_text("raise RuntimeError('shadowed')\n")
    make_filter(FilterConfig(function="my_checks:good"))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    import colorsys

    assert colorsys.rgb_to_hsv


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_checks:godo", r"my_checks has no function godo; did you mean 'good'\?"),
        ("no_such_module:good", "cannot import no_such_module from .*: ModuleNotFoundError"),
        ("my_broken:good", "cannot import my_broken from .*: ZeroDivisionError: division by zero"),
    ],
)
def test_function_that_cannot_be_found_is_refused(checks, name, message):
    checks.write_text("def good(record, response): return True\nx = 1\n")
    (checks.parent / "my_broken.py").write_text("1 / 0\n")
    with pytest.raises(DistillabError, match=message) as caught:
        make_filter(FilterConfig(function=name))
    assert "\n" not in str(caught.value)


def test_function_must_return_a_bool(checks):
    checks.write_text(
        "import numpy as np\ndef forgot(r, s): pass\ndef fine(r, s): return np.True_\n"
    )
    with pytest.raises(TypeError, match="returned None, expected True or False"):
        make_filter(FilterConfig(function="my_checks:forgot"))({}, None, "x")
    assert make_filter(FilterConfig(function="my_checks:fine"))({}, None, "x") is True
