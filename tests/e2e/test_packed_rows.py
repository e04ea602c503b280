"""配方里的 ``data.packing``：同样的数据，装不装在一起、几个进程，每一步都是同样的数。"""

import json
import re
from pathlib import Path

import pytest
from test_invariance import METHODS, assert_same, options, split, steps
from test_invariance import taught as taught

PACKED = ["data.packing=true", "data.max_seq_len=160"]
# 一个窗口装得下一整轮：装与不装，每一步都是全部的数据。
EPOCH = ["train.gradient_accumulation_steps=100", "train.batch_size=1", "train.max_steps=3"]
ALONE = ["data.teacher_source=null"]
CASES = {
    "online": [*ALONE, "loss.alpha=0.5", "student={path: null, init: {from: teacher, layers: 2}}"],
    "skd": ["loss.alpha=1.0", "student={path: null, init: {from: teacher, layers: 2}}"],
    "skd of pretrained": ["loss.alpha=0.9"],
    "seqkd": [*ALONE, "loss.alpha=0"],
}


@pytest.fixture
def roomy(taught):
    """一行装得下好几条的教师；RoPE 没有位置表，上限只是一个数。"""
    path = Path("teacher/config.json")
    config = json.loads(path.read_text()) | {"max_position_embeddings": 160}
    path.write_text(json.dumps(config))
    return taught


@pytest.fixture
def train(roomy, command):
    def train(name, *overrides):
        code, _, err = command("train", "recipe.yaml", *options([*overrides, f"name={name}"]))
        assert code == 0, err
        return steps(name), err

    return train


@pytest.mark.parametrize("case", CASES)
def test_packing_does_not_show(train, case):
    plain, _ = train("plain", *CASES[case], *EPOCH, "data.max_seq_len=160")
    packed, log = train("packed", *CASES[case], *EPOCH, *PACKED)
    (rows,) = re.findall(r"packed 32 conversations into (\d+) rows of 160", " ".join(log.split()))
    assert int(rows) <= 16
    assert_same(packed, plain, rel=1e-4)
    one, other = (
        json.loads(Path(f"runs/{n}/summary.json").read_text()) for n in ("plain", "packed")
    )
    key = "student_after"
    assert other[key]["perplexity"] == pytest.approx(one[key]["perplexity"], rel=1e-3)


def test_micro_batches_of_rows_do_not_show(train):
    whole, _ = train("whole", *CASES["skd"], *PACKED, *split(4, 1))
    parts, _ = train("parts", *CASES["skd"], *PACKED, *split(1, 4))
    assert_same(parts, whole)


@pytest.mark.slow
def test_two_processes_give_the_steps_of_one(train, together):
    overrides = [*CASES["skd of pretrained"], *PACKED]
    expected, _ = train("one", *overrides, *split(2, 2))
    together("train", "recipe.yaml", *options([*overrides, *split(2, 1), "name=two"]))
    assert_same(steps("two"), expected)


def test_sampled_responses_fall_back_to_padding_and_say_so(train):
    method = METHODS["gkd 1.0 greedy"]
    plain, _ = train("plain", *method, "data.max_seq_len=160")
    found, log = train("packed", *method, *PACKED)
    assert "data.packing: sampled responses have no length" in " ".join(log.split())
    assert_same(found, plain, rel=0)


def test_attention_that_does_not_keep_documents_apart_falls_back_and_says_so(train, monkeypatch):
    plain, _ = train("plain", *CASES["skd"], "data.max_seq_len=160")
    monkeypatch.setattr("distillab.assembly.training.keeps_documents_apart", lambda model: False)
    found, log = train("packed", *CASES["skd"], *PACKED)
    assert "the attention of the student does not keep documents apart" in " ".join(log.split())
    assert_same(found, plain, rel=0)


def test_packing_without_a_length_is_refused(taught, command):
    code, _, err = command("train", "recipe.yaml", *options(["data.packing=true"]))
    assert code == 2
    assert "packing needs max_seq_len: the length that rows are packed to" in " ".join(err.split())


def test_the_articles_of_a_chunk_are_kept_apart(workdir, command):
    losses = {}
    for name, packing in (("together", "false"), ("apart", "true")):
        arguments = options([f"data.packing={packing}", "train.max_steps=3", f"name={name}"])
        code, _, err = command("train", "recipe.yaml", *arguments)
        assert code == 0, err
        losses[name] = steps(name)
    assert losses["apart"][0]["tokens"] < losses["together"][0]["tokens"]
    assert losses["apart"][0]["loss"] != losses["together"][0]["loss"]
