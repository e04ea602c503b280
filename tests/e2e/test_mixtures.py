"""几个来源混在一起训练：各按权重，各有各的格式与视角，被杀之后接着走的步也一样。"""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from run_files import back_to, rows

ITEMS = ["lamp", "door", "roof", "wall"]


def chat(name, count, *, experience=False):
    rows = []
    for number in range(count):
        system = [{"role": "system", "content": f"the {ITEMS[number % 4]} is red"}]
        turns = [
            {"role": "user", "content": f"colour of {ITEMS[number % 4]} {number}?"},
            {"role": "assistant", "content": "red"},
        ]
        rows.append({"id": f"t{number}", "messages": system * experience + turns})
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def mixture(workdir):
    """三个来源：带经验的对话，普通的对话，文本。"""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["data"] = {
        "mixture": [
            {"source": chat("book.jsonl", 24), "teacher_source": chat("known.jsonl", 24,
             experience=True), "format": "chat", "max_seq_len": 64, "weight": 2},
            {"source": chat("general.jsonl", 16), "format": "chat", "max_seq_len": 64},
            {"source": "text.jsonl", "max_seq_len": 16, "weight": 1},
        ]
    }  # fmt: skip
    recipe["train"] |= {"eval_interval": 6, "save_interval": 3}
    recipe["evaluate"]["max_sequences"] = 12
    Path("mixed.yaml").write_text(yaml.safe_dump(recipe))
    return workdir


@pytest.fixture
def train(mixture, train_recipe):
    return partial(train_recipe, "mixed.yaml")


def assert_same(found, expected, rel=1e-5):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left["tokens"] == right["tokens"]
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=rel), (left["step"], key)


def test_every_source_is_trained_by_its_weight_measured_and_said(train, command):
    out = train("whole")
    summary = json.loads(Path("runs/whole/summary.json").read_text())
    used = summary["sources"]
    assert [one["sequences"] for one in used.values()] == [24, 12, 12]
    assert used["text"]["tokens"] == 12 * 15
    assert sum(one["tokens"] for one in used.values()) == summary["tokens"]
    assert used["book"]["epochs"] == pytest.approx(24 / 22)
    after = rows("whole", "validation")[-1]
    assert {after[f"{name}/perplexity"] for name in used} == {
        summary["student_after"][f"{name}/perplexity"] for name in used
    }
    for name in used:
        assert f"{name} (perplexity)" in out
    report = Path("runs/whole/report.html").read_text()
    assert "24 of them" in report
    assert "perplexity, validation of general" in report
    assert command("evaluate", "whole")[0] == 0
    found = json.loads(Path("runs/whole/evaluation.json").read_text())["texts"]["validation"]
    measured = found["models"]["student_after"]["perplexity"]["value"]
    assert measured == pytest.approx(after["perplexity"], rel=1e-5)


def test_each_source_is_measured_as_a_run_on_it_alone_would_be(train, command):
    train("whole")
    recipe = yaml.safe_load(Path("mixed.yaml").read_text())
    recipe["data"] = recipe["data"]["mixture"][2]
    del recipe["data"]["weight"]
    recipe["evaluate"]["max_sequences"] = 3
    Path("alone.yaml").write_text(yaml.safe_dump(recipe))
    assert command("train", "alone.yaml")[0] == 0
    mixed, alone = (rows(name, "reference") for name in ("whole", "alone"))
    for ours, theirs in zip(mixed, alone, strict=True):
        assert ours["text/perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)
        assert ours["text/kl"] == pytest.approx(theirs["kl"], rel=1e-5, abs=1e-9)


def test_micro_batches_do_not_show_and_a_resumed_run_takes_the_same_steps(train):
    train("whole")
    train("split", "train.batch_size=1", "train.gradient_accumulation_steps=4")
    assert_same(rows("split"), rows("whole"))
    expected = rows("whole")
    back_to("whole", 9)
    assert "at step 9" in train("whole", resume=True)
    assert_same(rows("whole"), expected, rel=0)


def test_two_processes_take_the_same_steps(train, together):
    train("one")
    sets = ["train.batch_size=2", "name=two"]
    together("train", "mixed.yaml", *[word for one in sets for word in ("--set", one)])
    assert_same(rows("two"), rows("one"))


def test_epochs_are_passes_over_the_first_source(train):
    train("run", "train.max_steps=null", "train.num_epochs=2", "train.warmup_steps=1")
    assert rows("run")[-1]["step"] == 2 * 22 * 2 // 4


def test_only_conversations_are_sampled_each_source_its_own_way(train):
    train("run", "responses.student_fraction=1", "loss.alpha=1", "sampling.max_new_tokens=5",
          "data.mixture.1.sampling={max_new_tokens: 2, temperature: 0}")  # fmt: skip
    found = rows("run")
    assert sum(row["rollout_responses"] for row in found) == 24 + 12
    text = 12 * 15
    assert 36 <= found[-1]["tokens"] - text <= 24 * 5 + 12 * 2


def test_a_stream_mixes_in_and_goes_on_where_it_was(train):
    options = ["data.mixture.2.streaming=true", "data.mixture.2.shuffle_buffer=20"]
    train("whole", *options)
    expected = rows("whole")
    back_to("whole", 9)
    assert "at step 9" in train("whole", *options, resume=True)
    assert_same(rows("whole"), expected, rel=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.mixture.0.packing=true", "data.mixture.2.packing=true"],
        ["loss={divergence: alm}"],
        ["student.vocab={keep: corpus}", "student.init.choose=influence"],
    ],
    ids=["packed", "two tokenizers", "trimmed, by influence"],
)
def test_what_else_a_recipe_may_choose(train, overrides):
    train("run", *overrides)
    assert len(rows("run")) == 12
    assert rows("run")[-1]["loss"] < rows("run")[0]["loss"]


def test_a_changed_weight_is_another_run(train, command):
    train("run")
    Path("runs/run/summary.json").unlink()
    sets = ["--set", "name=run", "--set", "data.mixture.1.weight=5"]
    code, _, err = command("train", "mixed.yaml", "--resume", *sets)
    assert code == 2
    assert "data.mixture" in err


def test_a_mixture_is_planned_but_not_synthesized(train, command):
    code, out, err = command("plan", "mixed.yaml", "--set", "train.max_steps=null")
    assert code == 0, err
    assert "the longest source's" in " ".join((out + err).split())
    code, _, err = command("synthesize", "mixed.yaml")
    assert code == 2
    assert "one file of responses answers one source" in " ".join(err.split())
