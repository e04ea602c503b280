"""``student.init`` 怎样变成学生：选哪些层，凭哪些文字，什么时候不再选。"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from distillab import run
from distillab.assembly import initial
from distillab.assembly.parts import build_models
from distillab.assembly.splits import Splits
from distillab.config.model_sections import InitialLayers
from distillab.config.recipes import load_recipe
from distillab.config.run_dir import RunDirectory
from distillab.config.schema import Recipe
from distillab.data.streams import TextStream
from distillab.errors import DistillabError
from distillab.evaluate.evaluate import evaluate
from distillab.models.importance import block_influence, most_influential
from distillab.models.interface import PretrainedLM
from distillab.models.pretrained import load_pretrained


@pytest.fixture
def workdir(tmp_path, monkeypatch, tiny_teacher_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_teacher_dir, "teacher")
    words = [
        "the",
        "teacher",
        "gives",
        "a",
        "student",
        "some",
        "soft",
        "targets",
        "and",
        "it",
        "learns",
        "them",
    ]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=30)) for _ in range(60)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [{"prompt": f"{text[:20]}?", "completion": text[20:50]} for text in texts]
    Path("chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def recipe(init=None, data=None, **sections):
    return Recipe.model_validate(
        {
            "name": "cut",
            "teacher": {"path": "teacher"},
            "student": {"init": {"from": "teacher", "layers": 2} | (init or {})},
            "data": {"source": "text.jsonl", "max_seq_len": 16} | (data or {}),
            "train": {"batch_size": 4, "max_steps": 2, "warmup_steps": 1, "precision": "fp32"},
        }
        | sections
    )


def built(config, recorded=None):
    return build_models(config.student, config.teacher, config.train, Splits(config), recorded)


def never(*_):
    raise AssertionError("the layers were measured again")


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("how", ["influence", "greedy"])
def test_the_choice_is_measured_once_and_changes_no_random_number_after_it(how, monkeypatch):
    config = recipe({"choose": how})
    first = built(config)
    drawn = torch.rand(3)
    for name in ("block_influence", "greedy_removal"):
        monkeypatch.setattr(initial, name, never)
    again = built(config)
    assert torch.equal(torch.rand(3), drawn)
    assert again.initial == first.initial
    for one, other in zip(first.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(AssertionError, match="measured again"):
        built(recipe({"choose": how}, train={"seed": 1}))
    weights = load_pretrained("teacher", dtype=torch.float32)
    with torch.no_grad():
        weights.model.norm.weight.add_(1)
    weights.save_pretrained("teacher")
    with pytest.raises(AssertionError, match="measured again"):
        built(config)


@pytest.mark.usefixtures("workdir")
def test_the_student_has_the_layers_of_the_largest_influence():
    config = recipe({"choose": "influence"})
    parts = built(config)
    source = PretrainedLM(load_pretrained("teacher", dtype=torch.float32))
    rows = Splits(config).sample(parts.tokenizer, 64, initial.INFLUENCE_TOKENS).rows()
    scores = block_influence(source, rows)
    assert parts.initial.scores == pytest.approx(scores)
    assert parts.initial.layers == most_influential(scores, 2)
    ranked = sorted(scores, reverse=True)
    assert parts.initial.line().endswith(
        f"of the 3 of the teacher, by block influence on {sum(map(len, rows)):,} training tokens "
        f"({ranked[1]:.4f} was kept, {ranked[2]:.4f} was not)"
    )
    for place, layer in enumerate(parts.initial.layers):
        theirs = source.model.model.layers[layer].mlp.up_proj.weight
        assert torch.equal(parts.student.layers[place].ffn.up_proj.weight, theirs)


@pytest.mark.usefixtures("workdir")
def test_listed_layers_are_those_of_the_student():
    config = recipe({"choose": [1, 2], "layers": None})
    assert config.student.init.layers == 2
    assert built(config).initial.layers == [1, 2]
    config = recipe({"choose": [0]}, student={"init": {"from": "teacher", "choose": [0]}})
    assert built(config).student.config.num_layers == 1


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("kind", ["text", "stream", "chat"])
def test_the_layers_are_measured_on_training_rows_and_never_on_validation(kind, tiny_tokenizer):
    data = {
        "text": {},
        "stream": {"streaming": True},
        "chat": {"source": "chat.jsonl", "format": "chat", "max_seq_len": 64},
    }[kind]
    config = recipe(data=data)
    longest = config.data.max_seq_len
    splits = Splits(config)
    rows = {tuple(row.tolist()) for row in splits.sample(tiny_tokenizer, longest, 10**4).rows()}
    train, validation = (list(part)[:500] if not isinstance(part, TextStream) else None
                         for part in map(_listed, splits.sources[0].of(tiny_tokenizer, longest)))  # fmt: skip
    assert rows
    assert not rows & set(validation)
    assert train is None or rows <= set(train)
    few = splits.sample(tiny_tokenizer, longest, 100).rows()
    assert 100 <= sum(map(len, few)) < 100 + longest
    other = Splits(recipe(data=data, train={"max_steps": 2, "warmup_steps": 1, "seed": 5}))
    different = other.sample(tiny_tokenizer, longest, 100).rows()
    assert [row.tolist() for row in different] != [row.tolist() for row in few]


def _listed(part):
    if isinstance(part, TextStream):
        return part
    items = (part[index] for index in range(len(part)))
    return [
        tuple(item["input_ids"].tolist() if isinstance(item, dict) else item.student.ids)
        for item in items
    ]


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize(
    ("init", "said"),
    [
        ({"layers": 4, "choose": "influence"}, "init.layers=4, expected 1 to 3"),
        ({"layers": None, "choose": [0, 3]}, "choose lists layer 3, expected 0 to 2"),
    ],
)
def test_layers_that_the_teacher_does_not_have_are_refused(init, said):
    with pytest.raises(DistillabError, match=said) as caught:
        built(recipe(init))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("workdir")
def test_measuring_without_data_is_refused():
    config = recipe({"choose": "influence"})
    with pytest.raises(DistillabError, match=r"choose=influence reads training data"):
        build_models(config.student, config.teacher, config.train)
    config = recipe({"choose": "influence", "layers": 3})  # 全留就不必量
    assert build_models(config.student, config.teacher, config.train).initial.layers == [0, 1, 2]


@pytest.mark.usefixtures("workdir")
def test_a_run_keeps_its_layers_and_a_second_round_starts_from_its_export(monkeypatch):
    config = recipe({"choose": "influence"})
    directory, summary = run.train(config)
    saved = json.loads((directory.path / "initial.json").read_text())
    assert len(saved["scores"]) == 3
    assert saved["layers"] == most_influential(saved["scores"], 2)
    before = summary["student_before"]["perplexity"]
    # 缓存没有了：恢复与评测都照记录
    shutil.rmtree("cache/layers")
    monkeypatch.setattr(initial, "block_influence", never)
    (directory.path / "summary.json").unlink()
    run.train(config, resume=True)
    found, _ = evaluate("cut", "best")
    measured = found["texts"]["validation"]["models"]["student_before"]["perplexity"]["value"]
    assert measured == pytest.approx(before, rel=1e-4)
    second = recipe({"from": str(directory.export), "layers": 1, "choose": "even"}).model_copy(
        update={"name": "second"}
    )
    found, _ = run.train(second)
    assert found.initial == InitialLayers(
        source=str(directory.export), choose="even", total=2, layers=[0]
    )


@pytest.mark.usefixtures("workdir")
def test_another_model_needs_no_teacher_and_brings_its_own_tokenizer(tiny_tokenizer):
    config = recipe({"from": "./teacher", "choose": "influence"}, teacher=None, loss={"alpha": 0.0})
    parts = built(config)
    assert parts.teacher is None
    assert parts.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert parts.initial.source == "./teacher"
    beside = built(recipe({"from": "./teacher", "choose": "influence"}))
    assert beside.initial == parts.initial


@pytest.mark.usefixtures("workdir")
def test_a_recipe_saved_before_there_was_a_choice_stays_even():
    saved = recipe().values()
    del saved["student"]["init"]["choose"]
    assert Recipe.model_validate(saved).student.init.choose == "even"


@pytest.mark.usefixtures("workdir")
def test_a_resumed_run_keeps_its_way_of_choosing_where_the_recipe_names_none():
    begun = recipe({"choose": "influence"})
    directory = RunDirectory(Path("runs/cut"))
    with directory:
        directory.open(begun, resume=False)
    (directory.path / "metrics.jsonl").touch()
    silent = recipe()
    assert "choose" not in silent.student.init.model_fields_set
    assert directory.keeping_choice(silent).student.init.choose == "influence"
    assert directory.keeping_choice(recipe({"choose": "even"})).student.init.choose == "even"
    with directory:
        directory.open(directory.keeping_choice(silent), resume=True)
    assert load_recipe(str(directory.recipe_file)).student.init.choose == "influence"


def test_a_record_that_is_none_is_refused_in_one_line(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.initial_file.write_text('{"layers": "all"}')
    with pytest.raises(DistillabError, match=r"initial\.json: not the layers.* delete it"):
        directory.initial  # noqa: B018
