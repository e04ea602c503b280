"""文档与代码对得上：docstring 一个不缺，配方参考一键不漏，引用的报错都还在。"""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def _docs_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(DOCS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_public_object_has_a_chinese_docstring():
    import docstrings

    found = list(docstrings.public_objects())
    assert len(found) > 400
    assert [name for name, documented in found if not documented] == []


def test_a_public_object_without_a_chinese_docstring_is_found(tmp_path):
    import docstrings

    (tmp_path / "one.py").write_text(
        '"""模块。"""\n'
        "def bare(): ...\n"
        'def english():\n    """Adds."""\n'
        "def _private(): ...\n"
        'class Kind:\n    """类。"""\n    def method(self): ...\n    def _own(self): ...\n'
        "if True:\n    def guarded(): ...\n"
    )
    assert docstrings.missing(tmp_path) == [
        "one.bare", "one.english", "one.Kind.method", "one.guarded",
    ]  # fmt: skip


def test_every_quoted_error_is_in_the_source_and_every_error_of_a_user_is_explained():
    import error_texts

    assert len(error_texts.quoted()) > 200
    assert error_texts.stale() == []
    assert error_texts.unexplained() == []


def test_an_error_that_changed_and_one_that_is_new_are_found(tmp_path):
    import error_texts

    (tmp_path / "one.py").write_text(
        "def check(size):\n"
        '    raise DistillabError(f"size is {size}, expected at least 1")\n'
        "def other(name):\n"
        '    raise DistillabError(f"{name}: brand new {name!r}")\n'
    )
    page = tmp_path / "page.md"
    page.write_text("`size is …, expected at least 1`\n:   x\n\n`size is …, expected two`\n:   x\n")
    assert error_texts.stale(page, tmp_path) == ["size is …, expected two"]
    assert error_texts.unexplained(page, tmp_path) == ["one:4: …: brand new …"]


def test_every_entry_of_the_error_page_says_what_to_do():
    lines = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    entries = [number for number, line in enumerate(lines) if re.fullmatch(r"`[^`]+`", line)]
    assert entries
    for number in entries:
        assert re.match(r":   \S", lines[number + 1]), lines[number]


def test_the_recipe_reference_has_every_key_and_explains_it():
    import recipe_reference

    from distillab.config.recipes import load_recipe, shipped_recipes

    keys = set(recipe_reference.keys())
    assert {"name", "train.seed", "student.init.from", "evaluate.tasks.NAME.match.exact"} <= keys
    for name in shipped_recipes():
        for key in leaves(load_recipe(name).model_dump(mode="json", by_alias=True)):
            assert any(re.fullmatch(as_pattern(known), key) for known in keys), key
    rows = [row for row in recipe_reference.page().splitlines() if row.startswith("| `")]
    assert len(rows) == len(keys)
    assert [row for row in rows if row.split(" | ")[-1].strip(" |") == ""] == []


def leaves(value, prefix=""):
    for key, child in value.items():
        name = f"{prefix}{key}"
        if name in ("data.template_options", "synthesize.server.extra_body"):
            yield name
        elif isinstance(child, dict) and child:
            yield from leaves(child, f"{name}.")
        else:
            yield name


def as_pattern(key):
    return re.escape(key).replace("NAME", "[^.]+")


def test_memory_tables_show_computed_and_measured():
    import memory_tables

    tables = {name: make() for name, make in memory_tables.TABLES.items()}
    named = re.findall(r"<!-- memory: (\w+) -->", (DOCS / "memory.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(tables)
    assert "| **合计** | **~9-11 GB** | **5.77 GiB** |" in tables["t4"]
    assert "| 0.80 | 8.03 |" in tables["measured"]
    assert tables["planned"].count("\n") >= 7


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = yaml.safe_load(re.sub(r"!!python\S+", "", text))
    listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    assert listed - {"recipe.md"} == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    assert config["strict"] is True


def test_formulas_become_mathml_and_chinese_lines_join():
    pytest.importorskip("mkdocs", reason="pip install 'distillab[docs]'")
    pytest.importorskip("latex2mathml", reason="pip install 'distillab[docs]'")
    import hooks

    made = hooks.on_page_content(
        '<span class="arithmatex">\\(a &lt; b\\)</span> '
        '<div class="arithmatex">\\[x^2\\]</div> :func:<code>render</code>'
    )
    assert hooks.on_page_content("汉字\n汉字，\n  字 a\nb<pre>汉\n字</pre>") == (
        "汉字汉字，字 a\nb<pre>汉\n字</pre>"
    )
    assert made.count("<math") == 2
    assert 'display="block"' in made
    assert "arithmatex" not in made
    assert made.endswith(" <code>render</code>")


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script src="https://cdn.example/a.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', True),
        ('<script src="assets/a.js"></script>', False),
        ('<a href="https://arxiv.org/abs/1503.02531">x</a>', False),
    ],
)
def test_a_page_that_fetches_from_the_network_is_found(html, fetched):
    pytest.importorskip("mkdocs", reason="pip install 'distillab[docs]'")
    pytest.importorskip("latex2mathml", reason="pip install 'distillab[docs]'")
    import hooks

    assert bool(hooks._FETCHED.search(html)) == fetched


def test_the_lower_bounds_are_those_that_are_tested_and_documented():
    def read(name):
        return (ROOT / name).read_text(encoding="utf-8")

    found = re.findall(r'^(?: {4}|peft = \[)"([\w-]+)>=([\d.]+)"', read("pyproject.toml"), re.M)
    bounds = dict(found)
    tested = re.findall(r"^([\w-]+)==([\d.]+)$", read("tests/versions/oldest.txt"), re.M)
    assert dict(tested) == bounds
    named = {"PyTorch": "torch", "transformers": "transformers", "accelerate": "accelerate"}
    for page in ("README.md", "README.zh-CN.md", "docs/index.md"):
        text = " ".join(read(page).split())
        assert all(f"{name} {bounds[package]}" in text for name, package in named.items()), page
