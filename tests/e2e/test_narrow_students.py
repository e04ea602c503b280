"""裁窄的学生走完整条命令：训练、恢复、导出，再由导出的裁第二轮。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillab.assembly.parts import build_models
from distillab.assembly.splits import Splits
from distillab.config.recipes import load_recipe
from distillab.errors import DistillabError
from distillab.export.convert import student_from_teacher
from distillab.models.pruning import most_active, narrowed, width_scores
from distillab.plan.hardware import find_device
from distillab.plan.plan import plan

NARROW = "student.init={from: teacher, layers: null, intermediate_size: 32, num_heads: 2, num_kv_heads: 1}"


def summary(run="runs/recipe"):
    return json.loads((Path(run) / "summary.json").read_text())


def planned(run="runs/recipe"):
    """不加载模型数出的参数。"""
    recipe = load_recipe(f"{run}/recipe.yaml")
    return plan(recipe, find_device("cpu")).step.student.parameters


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_two_rounds_of_narrowing_with_training_between(command):
    code, _, err = command("train", "recipe.yaml", "--set", NARROW)
    assert code == 0, err
    widths = "32 channels, in each layer 32 neurons, 2 heads and 1 key/value heads"
    assert widths in " ".join(err.split())
    assert summary()["parameters"]["student"] == planned()
    assert summary()["student_after"]["perplexity"] < summary()["student_before"]["perplexity"]
    first = weights("runs/recipe/export")
    assert first["model.layers.2.mlp.up_proj.weight"].shape == (32, 32)
    assert first["model.layers.2.self_attn.q_proj.weight"].shape == (16, 32)

    again = "student.init={from: runs/recipe/export, layers: 2, hidden_size: 16, num_heads: 2}"
    code, _, err = command("train", "recipe.yaml", "--set", again, "--set", "name=second")
    assert code == 0, err
    config = json.loads(Path("runs/second/export/config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 16)
    kept = json.loads(Path("runs/second/initial.json").read_text())["kept"]
    assert [len(row) for row in kept["neurons"]] == [32, 32]
    assert len(kept["channels"]) == 16
    extra = planned("runs/second") - summary("runs/second")["parameters"]["student"]
    assert extra == 2 * 16, "o_proj.bias of the first export: zeros, dropped where weights are read"


def test_units_are_scored_on_the_layers_that_stay(workdir, tiny_qwen2):
    recipe = load_recipe("recipe.yaml", [NARROW, "student.init.layers=2"])
    splits = Splits(recipe)
    parts = build_models(recipe.student, recipe.teacher, recipe.train, splits)
    cut = student_from_teacher(tiny_qwen2, parts.initial.layers)
    rows = splits.sample(parts.tokenizer, 64, 8192).rows()
    widths = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    kept = most_active(width_scores(cut, rows), cut.config, widths)
    assert parts.initial.kept == kept
    expected = narrowed(cut, kept).state_dict()
    assert all(torch.equal(expected[n], w) for n, w in parts.student.state_dict().items())


def test_a_config_beside_the_widths_says_how_long_the_student_reads(workdir):
    sizes = "hidden_size: 16, num_heads: 4, num_kv_heads: 2, intermediate_size: 48, num_layers: 2"

    def student(head_dim: int):
        config = f"{{{sizes}, vocab_size: 400, max_seq_len: 24, head_dim: {head_dim}}}"
        changes = ["student.init.hidden_size=16", f"student.config={config}"]
        recipe = load_recipe("recipe.yaml", changes)
        return build_models(recipe.student, recipe.teacher, recipe.train, Splits(recipe)).student

    found = student(8).config
    assert (found.hidden_size, found.head_width, found.max_seq_len) == (16, 8, 24)
    with pytest.raises(DistillabError, match=r"head_dim=4 differs from the teacher's"):
        student(4)


def test_a_resumed_run_keeps_its_units_without_measuring_again(command):
    assert command("train", "recipe.yaml", "--set", NARROW)[0] == 0
    before, picks = weights("runs/recipe/export"), Path("runs/recipe/initial.json").read_text()
    shutil.rmtree("cache/widths")
    Path("runs/recipe/summary.json").unlink()
    shutil.rmtree("runs/recipe/export")
    shutil.rmtree(max(Path("runs/recipe/checkpoints").glob("step*")))
    code, _, err = command("train", "recipe.yaml", "--resume", "--set", NARROW)
    assert code == 0, err
    assert Path("runs/recipe/initial.json").read_text() == picks
    assert not Path("cache/widths").exists()
    again = weights("runs/recipe/export")
    assert all(torch.equal(before[name], weight) for name, weight in again.items())


def test_widths_that_the_teacher_does_not_have_end_in_one_line(command):
    code, _, err = command("train", "recipe.yaml", "--set", "student.init.hidden_size=64")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: student.init.hidden_size=64 is larger than the 32 of its source; "
        "expected at most 32"
    )
