"""写当天日期的模板：一次运行、一份合成的回答里，写的总是开始的那一天。"""

import json
import shutil
import threading
from datetime import date
from pathlib import Path

import pytest
import yaml

from distillab import run
from distillab.config import run_dir
from distillab.config.recipes import dump_recipe, load_recipe
from distillab.config.run_dir import RunDirectory
from distillab.config.schema import Recipe
from distillab.data.chat_dataset import ChatDataset
from distillab.data.pairs import load_pairs
from distillab.errors import DistillabError

DATED = (
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def on(monkeypatch, day):
    """换一天。"""

    class Day(date):
        @classmethod
        def today(cls):
            return date.fromisoformat(day)

    monkeypatch.setattr(run_dir, "date", Day)
    monkeypatch.setattr(run, "date", Day)


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_teacher_dir):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher_dir, "teacher")
    Path("teacher/chat_template.jinja").write_text(DATED)
    rows = [{"id": str(i), "prompt": f"{i}?", "completion": "x"} for i in range(6)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Recipe.model_validate(
        {
            "name": "dated",
            "data": {"source": "data.jsonl", "format": "chat", "max_seq_len": 48},
            "teacher": {"path": "teacher"},
            "student": {"path": "teacher"},
            "synthesize": {"sampling": {"temperature": 0.0, "max_new_tokens": 2}},
        }
    )


def test_a_run_keeps_the_day_it_began(recipe, monkeypatch):
    on(monkeypatch, "2026-11-28")
    with RunDirectory(Path("runs/dated")) as directory:
        first = directory.dated(recipe)
        directory.open(first, resume=False)
    assert first.data.today == date(2026, 11, 28)
    (directory.path / "metrics.jsonl").touch()
    on(monkeypatch, "2026-11-29")
    with RunDirectory(Path("runs/dated")) as directory:
        again = directory.dated(recipe)
        directory.open(again, resume=True)
    assert again == first == directory.recipe
    # 说好的那一天要一直是那一天
    other = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"today": date(2020, 1, 1)})}
    )
    with (
        RunDirectory(Path("runs/dated")) as directory,
        pytest.raises(DistillabError, match=r"data.today was '2026-11-28' and is now '2020-01-01'"),
    ):
        directory.open(directory.dated(other), resume=True)


def test_a_run_that_recorded_no_day_can_be_continued(recipe, monkeypatch):
    with RunDirectory(Path("runs/dated")) as directory:
        directory.open(recipe, resume=False)
    (directory.path / "metrics.jsonl").touch()
    with RunDirectory(Path("runs/dated")) as directory:
        directory.open(directory.dated(recipe), resume=True)
    assert directory.recipe.data.today == date.today()


def test_text_runs_have_no_day(recipe):
    data = {"source": "x", "format": "text"}
    text = Recipe.model_validate({**recipe.model_dump(by_alias=True), "data": data})
    assert RunDirectory(Path("runs/dated")).dated(text).data.today is None


def test_other_processes_take_the_day_of_the_main_one(recipe, monkeypatch):
    """主进程在午夜之前，别的在午夜之后。"""
    on(monkeypatch, "2026-11-28")
    directory = RunDirectory(Path("runs/dated"))
    main = directory.dated(recipe)
    on(monkeypatch, "2026-11-29")
    monkeypatch.setenv("RANK", "1")
    with directory:
        writing = threading.Timer(0.3, directory.open, (main, False))
        writing.start()
        assert RunDirectory(directory.path).dated(recipe) == main
        writing.join()
    monkeypatch.setattr(run_dir, "_WAIT_SECONDS", 0.1)  # 没有共享的目录
    assert RunDirectory(Path("runs/other")).dated(recipe).data.today == date(2026, 11, 29)


def test_the_day_is_what_the_template_writes(recipe):
    from distillab.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("teacher")
    texts = {}
    for day in ("2024-07-26", "2024-07-27"):
        data = recipe.data.model_copy(update={"today": date.fromisoformat(day)})
        train, _, _ = ChatDataset.build(load_pairs(data)[0], data, tokenizer, max_seq_len=48)
        texts[day] = tokenizer.decode(train[0].student.ids)
    assert "26 Jul 2024" in texts["2024-07-26"]
    assert "27 Jul 2024" in texts["2024-07-27"]


@pytest.mark.parametrize("written", ["2026-11-28", "'2026-11-28'"])
def test_a_day_is_read_with_and_without_quotation_marks(recipe, written):
    text = yaml.safe_load(dump_recipe(recipe))
    Path("a.yaml").write_text(yaml.safe_dump(text).replace("today: null", f"today: {written}"))
    assert load_recipe("a.yaml").data.today == date(2026, 11, 28)
    Path("a.yaml").write_text(dump_recipe(load_recipe("a.yaml")))
    assert load_recipe("a.yaml").data.today == date(2026, 11, 28)
    with pytest.raises(
        DistillabError, match=r"data.today: found 'tomorrow', expected a date such as"
    ):
        load_recipe("a.yaml", ["data.today=tomorrow"])


def test_synthesis_that_is_continued_tomorrow_asks_as_today(recipe, monkeypatch):
    on(monkeypatch, "2026-11-28")
    assert run.synthesize(recipe).answered == 6
    output = Path("responses.jsonl")
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    on(monkeypatch, "2026-11-29")
    assert run.synthesize(recipe).answered == 6
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())
    provenance = json.loads(Path("responses.jsonl.provenance.json").read_text())
    assert provenance["teacher"]["today"] == "2026-11-28"


def test_synthesis_without_a_date_in_the_template_records_none(recipe, tiny_tokenizer):
    Path("teacher/chat_template.jinja").write_text(tiny_tokenizer.chat_template)
    run.synthesize(recipe)
    provenance = json.loads(Path("responses.jsonl.provenance.json").read_text())
    assert "today" not in provenance["teacher"]
