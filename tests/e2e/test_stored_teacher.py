"""教师的分布算一次、存下来：以后不再算，断在哪里都一样，与现算的相差只有抽样。"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from run_files import back_to, rows

from distillab.teachers.in_process import LocalTeacher

CACHED = ["teacher.cache={}", "loss={divergence: forward_kl, temperature: 1, alpha: 0.7}"]


def chat(count=24):
    for name, experience in (("plain", False), ("known", True)):
        rows = []
        for number in range(count):
            system = [{"role": "system", "content": f"item {number % 5} is red"}]
            turns = [
                {"role": "user", "content": f"colour of {number}?"},
                {"role": "assistant", "content": "red" if number % 2 else "blue"},
            ]
            rows.append({"id": f"t{number}", "messages": system * experience + turns})
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def calls(monkeypatch):
    """教师前向了几批。"""
    found = []
    targets = LocalTeacher.targets

    def counted(self, view, vocabulary):
        found.append(len(view.index))
        return targets(self, view, vocabulary)

    monkeypatch.setattr(LocalTeacher, "targets", counted)
    return found


@pytest.fixture
def train(workdir, train_recipe):
    chat()
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["data"] = {"source": "plain.jsonl", "teacher_source": "known.jsonl", "format": "chat",
                      "max_seq_len": 64}  # fmt: skip
    Path("chat.yaml").write_text(yaml.safe_dump(recipe))

    def train(name, *overrides, recipe="recipe.yaml", resume=False):
        return train_recipe(recipe, name, *overrides, resume=resume)

    return train


def assert_same(found, expected, rel=0.0):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        for key in ("loss", "divergence", "cross_entropy", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=rel), (left["step"], key)


@pytest.mark.parametrize("recipe", ["recipe.yaml", "chat.yaml"])
def test_a_text_is_asked_once_and_a_second_run_asks_nothing(train, calls, recipe):
    epochs = ["train.num_epochs=3", "train.max_steps=null", "train.warmup_steps=1",
              "data.validation_fraction=0.2", "train.eval_interval=1000"]  # fmt: skip
    if recipe == "recipe.yaml":
        epochs.append("data.size_mb=0.004")
    train("cold", *CACHED, *epochs, recipe=recipe)
    asked = len(calls)
    assert asked > 0
    train("warm", *CACHED, *epochs, recipe=recipe)
    assert len(calls) == asked
    assert_same(rows("warm"), rows("cold"))
    assert [row["kl"] for row in rows("warm", "reference")] == [
        row["kl"] for row in rows("cold", "reference")
    ]
    trained = [row["epoch"] for row in rows("cold")]
    assert trained[-1] >= 2
    assert asked < len(rows("cold"))


def test_packing_asks_nothing_new(train, calls):
    train("padded", *CACHED, recipe="chat.yaml")
    asked = len(calls)
    train("packed", *CACHED, "data.packing=true", "train.batch_size=2", recipe="chat.yaml")
    assert len(calls) == asked


def test_a_resumed_run_takes_the_same_steps_whatever_is_stored(train):
    options = [*CACHED, "train.save_interval=3"]
    train("whole", *options)
    expected = rows("whole")
    for emptied in (False, True):
        back_to("whole", 9)
        if emptied:
            shutil.rmtree(Path("cache/targets"))
        assert "at step 9" in train("whole", *options, resume=True)
        assert_same(rows("whole"), expected)


@pytest.mark.parametrize("recipe", ["recipe.yaml", "chat.yaml"])
def test_all_of_the_vocabulary_is_the_teacher_itself(train, recipe):
    whole = "teacher.cache={keep: top_k, k: 1000, tail: bucket}"
    train("live", CACHED[1], recipe=recipe)
    train("stored", CACHED[1], whole, recipe=recipe)
    assert_same(rows("stored"), rows("live"), rel=1e-2)  # float16 的概率
    for left, right in zip(rows("stored", "reference"), rows("live", "reference"), strict=True):
        for key in ("perplexity", "cross_entropy", "top1_agreement"):
            assert left[key] == pytest.approx(right[key], rel=1e-5)
        assert left["kl"] == pytest.approx(right["kl"], rel=1e-2, abs=1e-4)


def test_draws_are_near_the_teacher(train):
    train("live", CACHED[1])
    train("stored", CACHED[1], "teacher.cache={samples: 64}")
    for left, right in zip(rows("stored"), rows("live"), strict=True):
        assert left["divergence"] == pytest.approx(right["divergence"], rel=0.2)
        assert left["cross_entropy"] == pytest.approx(right["cross_entropy"], rel=0.02)


def test_adapters_over_the_teacher_and_two_processes_read_the_same_store(train, together, calls):
    lora = ["student.init=null", "student.path=teacher", "student.lora.rank=4"]
    train("lora", *CACHED, *lora)
    assert calls
    train("one", *CACHED)
    sets = [*CACHED, "train.batch_size=2", "name=two"]
    together("train", "recipe.yaml", *[word for one in sets for word in ("--set", one)])
    assert_same(rows("two"), rows("one"), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.cache={}"], "loss.temperature=2 and teacher.cache.keep=sampled disagree"),
        ([*CACHED, "loss.divergence=jsd"], "loss.divergence=jsd and teacher.cache.keep=sampled"),
        (["teacher.cache={keep: top_k, tail: renormalise}", "loss.divergence=reverse_kl"],
         "loss.divergence=reverse_kl and teacher.cache.tail=renormalise disagree"),
        (["teacher.cache={k: 5}"], "k belongs to keep: top_k"),
        (["teacher.cache={keep: top_k, samples: 5}"], "samples belongs to keep: sampled"),
        ([*CACHED, "teacher.cache.samples=0"], "teacher.cache.samples: found 0"),
        (["teacher.cache={}", "loss={divergence: alm}"], "loss.divergence=alm and teacher.cache"),
        ([*CACHED, "loss.alpha=1", "responses.student_fraction=0.5", "data.format=chat"],
         "responses.student_fraction=0.5 and teacher.cache disagree"),
    ],
)  # fmt: skip
def test_what_a_store_cannot_answer_is_refused_in_one_line(workdir, command, overrides, message):
    sets = [word for one in overrides for word in ("--set", one)]
    code, _, err = command("train", "recipe.yaml", *sets)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_store_of_another_teacher_is_refused(train, command):
    train("one", *CACHED, "teacher.cache={path: store}")
    sets = [*CACHED, "teacher.cache={path: store, seed: 3}", "name=two"]
    code, _, err = command("train", "recipe.yaml", *[w for one in sets for w in ("--set", one)])
    assert code == 2
    assert "seed" in err


def test_a_trimmed_vocabulary_is_another_store_and_reads_its_own(train, calls):
    trimmed = [*CACHED, "student.vocab={keep: corpus}"]
    train("cold", *trimmed)
    asked = len(calls)
    train("warm", *trimmed)
    assert len(calls) == asked
    assert_same(rows("warm"), rows("cold"))
    assert "outside" in rows("cold", "reference")[-1]
