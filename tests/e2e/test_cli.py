"""整条命令：训练、被杀、恢复、评测、生成、导出，都走真正的命令行。"""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillab.assembly.parts import build_models
from distillab.assembly.splits import Splits
from distillab.config.recipes import load_recipe, shipped_recipes
from distillab.run import train
from distillab.run_file_shapes import read_metrics


def losses(run="runs/recipe"):
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def wait_for_step(process, step, run="runs/recipe"):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(row[0] >= step for row in losses(run)):
            return
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.01)
    pytest.fail("the run did not get that far")


def test_train_leaves_a_complete_run_directory(command):
    code, out, _ = command("train", "recipe.yaml")
    assert code == 0
    run = Path("runs/recipe")
    assert {path.name for path in run.iterdir() if path.name[0] != "."} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "samples.jsonl",
        "checkpoints", "run_id", "export", "plots", "report.html",
        "initial.json",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    for model in ("teacher", "student_before", "student_after"):
        assert set(summary[model]) == {
            "perplexity", "cross_entropy", "kl", "top1_agreement", "bits_per_byte"
        }  # fmt: skip
    assert summary["student_after"]["perplexity"] < summary["student_before"]["perplexity"]
    assert summary["tokens"] == 12 * 4 * 15
    for key in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        assert summary[key] > 0
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    for plot in ("loss.png", "perplexity.png"):
        assert (run / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    assert f"{summary['student_after']['perplexity']:,.1f}" in out
    assert "> the teacher" in out
    assert max(map(len, out.splitlines())) <= 80


def test_existing_run_is_refused_and_a_finished_one_resumes_to_its_result(command):
    assert command("train", "recipe.yaml")[0] == 0
    before = Path("runs/recipe/metrics.jsonl").read_text()
    code, _, err = command("train", "recipe.yaml")
    assert code == 2
    assert err == (
        "error: runs/recipe exists; continue it with --resume, or name a new run with "
        "--set name=recipe-2\n"
    )
    recipe = "runs/recipe/recipe.yaml"
    for arguments in (
        (recipe, "--resume"), (recipe, "--resume", "auto"), ("--resume", "auto", recipe),
        ("--resume", recipe), (recipe, "--resume=auto"),
    ):  # fmt: skip
        code, out, err = command("train", *arguments)
        assert code == 0, err
        assert "student after" in out
    assert Path("runs/recipe/metrics.jsonl").read_text() == before


def test_run_killed_after_its_last_step_still_reaches_its_summary(command):
    assert command("train", "recipe.yaml")[0] == 0
    summary = Path("runs/recipe/summary.json")
    before = json.loads(summary.read_text())
    summary.unlink()
    assert command("train", "recipe.yaml", "--resume")[0] == 0
    after = json.loads(summary.read_text())
    assert after | {"peak_memory_bytes": 0} == before | {"peak_memory_bytes": 0}


def test_run_that_failed_before_it_began_is_simply_started_again(command):
    assert command("train", "recipe.yaml", "--set", "data.text_field=body")[0] == 2
    assert command("train", "recipe.yaml")[0] == 0


def test_directory_that_is_no_run_is_left_alone(command):
    Path("runs/recipe").mkdir(parents=True)
    Path("runs/recipe/thesis.txt").write_text("years of work")
    for flags in ((), ("--resume",)):
        code, _, err = command("train", "recipe.yaml", *flags)
        assert code == 2
        assert err == "error: runs/recipe exists but is not a run: it has no recipe.yaml\n"
    assert [path.name for path in Path("runs/recipe").iterdir() if path.suffix] == ["thesis.txt"]


def test_resume_with_another_recipe_is_refused_except_for_what_changes_no_number(command):
    assert command("train", "recipe.yaml")[0] == 0
    changed = ("train", "recipe.yaml", "--resume", "--set", "train.learning_rate=1e-3")
    code, _, err = command(*changed)
    assert code == 2
    assert "train.learning_rate was 0.003 and is now 0.001" in err
    free = "--set", "train.log_interval=2", "--set", "train.compile=false"  # 后者从前是缺省
    assert command("train", "recipe.yaml", "--resume", *free)[0] == 0


def test_alpha_zero_is_the_same_run_without_a_teacher_in_training(command):
    assert command("train", "recipe.yaml", "--set", "loss.alpha=0", "--set", "name=ce")[0] == 0
    rows = read_metrics(Path("runs/ce/metrics.jsonl"))
    assert all(row["divergence"] == 0 for row in rows if row["kind"] == "train")
    assert json.loads(Path("runs/ce/summary.json").read_text())["student_after"]["kl"] > 0


@pytest.mark.slow
def test_killed_run_resumes_to_the_bit_identical_loss_sequence(start, command):
    slower = ("--set", "train.max_steps=40")
    process = start("train", "recipe.yaml", *slower)
    wait_for_step(process, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path("runs/recipe/summary.json").exists()
    again = start("train", "recipe.yaml", *slower, "--resume")
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert "resumed from" in err
    whole = start("train", "recipe.yaml", *slower, "--set", "name=whole")
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    assert len(losses()) == 40
    assert losses() == losses("runs/whole")


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_resume_and_exits_130(start):
    process = start("train", "recipe.yaml", "--set", "train.max_steps=2000",
                    "--set", "train.save_interval=1000", "--set", "train.eval_interval=1000")  # fmt: skip
    wait_for_step(process, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "to continue: distillab train runs/recipe/recipe.yaml --resume" in err
    assert "Traceback" not in err
    assert [path.name for path in Path("runs/recipe/checkpoints").glob("step-*")]


@pytest.mark.slow
def test_two_processes_never_write_into_one_run(start, command):
    process = start("train", "recipe.yaml", "--set", "train.max_steps=2000")
    try:
        wait_for_step(process, 1)
        code, _, err = command("train", "recipe.yaml", "--set", "train.max_steps=2000", "--resume")
    finally:
        process.kill()
        process.communicate()
    assert code == 2
    assert err == "error: runs/recipe is in use by another process\n"


def test_evaluate_measures_the_checkpoint_that_the_summary_shows(command):
    command("train", "recipe.yaml")
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    code, out, _ = command("evaluate", "recipe")
    assert code == 0
    assert f"{summary['student_after']['perplexity']:,.1f}" in out
    code, out, _ = command("evaluate", "recipe", "--checkpoint", "step-00000008")
    assert code == 0
    assert "step-00000008" in out


def test_exported_student_is_an_ordinary_checkpoint_with_a_card(command):
    server = "synthesize.server={base_url: 'http://inside.example/v1', model: m}"
    command("train", "recipe.yaml", "--set", server)
    model = AutoModelForCausalLM.from_pretrained("runs/recipe/export")
    tokenizer = AutoTokenizer.from_pretrained("runs/recipe/export")
    ids = tokenizer("the teacher", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    sample = json.loads(Path("runs/recipe/samples.jsonl").read_text().splitlines()[0])
    assert text.removesuffix("<|endoftext|>") == sample["prompt"] + sample["student"]
    card = Path("runs/recipe/export/README.md").read_text()
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    for fact in ("teacher", "text.jsonl", f"{summary['tokens']:,}", "max_steps: 12"):
        assert fact in card
    assert "inside.example" not in card  # 自己的服务在哪里，与用这个模型的人无关
    assert "inside.example" in Path("runs/recipe/recipe.yaml").read_text()


def test_export_of_another_checkpoint_goes_where_it_is_told(command):
    command("train", "recipe.yaml")
    code, out, _ = command("export", "recipe", "--checkpoint", "last", "--output", "elsewhere")
    assert (code, out) == (0, "elsewhere\n")
    state = AutoModelForCausalLM.from_pretrained("elsewhere").state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


def test_generate_prints_prompts_and_completions_and_repeats_with_a_seed(command):
    command("train", "recipe.yaml")
    sampled = ("generate", "recipe", "--prompt", "the teacher", "--strategy", "top_p",
               "--max-new-tokens", "8", "--seed", "1")  # fmt: skip
    code, first, _ = command(*sampled)
    assert code == 0
    assert first.startswith("the teacher")
    assert command(*sampled)[1] == first
    code, out, _ = command("generate", "teacher", "--prompt", "a", "--prompt", "b",
                           "--max-new-tokens", "4")  # fmt: skip
    assert code == 0
    assert out.startswith("a")
    assert "\nb" in out


def test_recipes_lists_what_train_accepts(command):
    code, out, _ = command("recipes")
    assert code == 0
    for name in ("quickstart", "wiki-zh", "qwen3-chat"):
        assert name in out


def test_schema_is_json(command):
    code, out, _ = command("schema")
    assert code == 0
    assert json.loads(out)["title"] == "distillab recipe"


def test_student_from_a_pretrained_path_trains_too(command):
    section = "student={path: teacher}"
    assert command("train", "recipe.yaml", "--set", "name=whole", "--set", "student=null")[0] == 2
    code, _, err = command(
        "train", "recipe.yaml", "--set", "name=path", "--set", "student.init=null",
        "--set", "student.path=teacher",
    )  # fmt: skip
    assert code == 0, (err, section)
    summary = json.loads(Path("runs/path/summary.json").read_text())
    assert summary["student_before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained("runs/path/export").config.num_hidden_layers == 3


def test_train_from_python_uses_the_models_it_is_given(workdir):
    recipe = load_recipe("recipe.yaml")
    parts = build_models(recipe.student, recipe.teacher, recipe.train, Splits(recipe))
    before = {name: value.clone() for name, value in parts.student.state_dict().items()}
    run, summary = train(recipe, parts=parts)
    assert any(
        not torch.equal(value, before[name]) for name, value in parts.student.state_dict().items()
    )
    # 与自己装配的是同样的训练。
    again, other = train(load_recipe("recipe.yaml", ["name=again"]))
    assert losses(run.path) == losses(again.path)
    assert summary["student_after"] == other["student_after"]


def test_student_from_scratch_without_any_teacher_trains_on_text(command):
    Path("scratch.yaml").write_text(
        "student:\n  tokenizer: teacher\n"
        "  config: {hidden_size: 32, num_layers: 1, num_heads: 4, num_kv_heads: 2,\n"
        "           intermediate_size: 32, vocab_size: 512, max_seq_len: 16}\n"
        "data: {source: text.jsonl}\nloss: {alpha: 0.0}\n"
        "train: {batch_size: 4, max_steps: 3, warmup_steps: 1}\n"
    )
    code, out, _ = command("train", "scratch.yaml")
    assert code == 0
    assert "teacher" not in json.loads(Path("runs/scratch/summary.json").read_text())
    assert "student after" in out


TEXT = ["data.source=text.jsonl", "data.max_seq_len=16", "train.warmup_steps=1"]
PAIRED = ["student.path=teacher", "data.source=plain.jsonl", "data.teacher_source=knowing.jsonl",
          "teacher.dtype=float32", "train.precision=fp32", "train.batch_size=2",
          "train.gradient_accumulation_steps=2"]  # fmt: skip
DEMO = [*PAIRED, "teacher.sha256=null", "student.sha256=null", "data.responses=null",
        "evaluate.texts.wikipedia.source=text.jsonl", "evaluate.texts.wikipedia.text_field=text",
        "evaluate.tasks.handbook.max_new_tokens=2",
        "evaluate.tasks.unrelated.max_new_tokens=2"]  # fmt: skip
STAND_INS = {
    "quickstart": [*TEXT, "student.init.layers=2", "teacher.sha256=null", "data.sha256=null",
                   "data.text_field=text"],
    "wiki-zh": [*TEXT, "student.config.hidden_size=32", "student.config.vocab_size=400",
                "student.config.num_layers=2", "data.subset=null", "train.precision=fp32"],
    "wiki-zh-trimmed": [*TEXT, "student.config.hidden_size=32", "student.config.num_layers=2",
                        "data.subset=null", "train.precision=fp32"],
    "qwen3-chat": ["student.path=teacher", "data.source=guanaco.jsonl", "train.warmup_steps=1",
                   "teacher.dtype=float32", "train.precision=fp32"],
    **{f"experience/{method}": PAIRED for method in ("seqkd", "skd", "gkd")},
    **{f"experience/demo-{method}": DEMO for method in ("seqkd", "skd", "gkd")},
}  # fmt: skip


def chat_files():
    """几段对话：带与不带经验的一对文件，和 guanaco 的写法；模板有 Qwen3 的选项，上下文长一些。"""
    config = json.loads(Path("teacher/config.json").read_text())
    Path("teacher/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    with Path("teacher/chat_template.jinja").open("a") as template:
        template.write("{% if enable_thinking %}{% endif %}")
    for name, system in (("plain", []), ("knowing", [{"role": "system", "content": "it is red"}])):
        rows = [
            {"id": str(i), "messages": [*system, {"role": "user", "content": f"what is {i}?"},
                                        {"role": "assistant", "content": "red"}]}
            for i in range(12)
        ]  # fmt: skip
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [f"### Human: what is {i}?### Assistant: red" for i in range(12)]
    Path("guanaco.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in turns))


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_runs_with_small_local_parts(command, recipe):
    chat_files()
    overrides = ["teacher.path=teacher", "train.max_steps=2", "evaluate.max_new_tokens=4",
                 *STAND_INS[recipe]]  # fmt: skip
    arguments = [part for override in overrides for part in ("--set", override)]
    code, _, err = command("train", recipe, *arguments)
    assert code == 0, err


@pytest.mark.slow
def test_a_few_steps_of_the_real_quickstart_already_help(
    command, package_cache, smollm2_dir, wiki_json, monkeypatch
):
    monkeypatch.setenv("DISTILLAB_CACHE", str(package_cache))
    overrides = ["train.max_steps=12", "train.warmup_steps=4", "train.batch_size=1",
                 "data.max_seq_len=128", "evaluate.max_sequences=4",
                 "evaluate.max_new_tokens=8"]  # fmt: skip
    arguments = [part for override in overrides for part in ("--set", override)]
    code, _, err = command("train", "quickstart", *arguments)
    assert code == 0, err
    summary = json.loads(Path("runs/quickstart/summary.json").read_text())
    assert summary["teacher"]["perplexity"] < 40
    before, after = (summary[key]["perplexity"] for key in ("student_before", "student_after"))
    assert 100 < before < 5_000
    assert after < before / 1.5
    code, out, _ = command("generate", "quickstart", "--prompt", "The", "--max-new-tokens", "4")
    assert code == 0
    assert out.startswith("The")


def test_plan_needs_no_weights_and_reaches_every_part_of_the_recipe(command):
    for weights in Path("teacher").glob("*.safetensors"):
        weights.unlink()
    code, out, err = command("plan", "recipe.yaml", "--device", "t4", "--set", "train.batch_size=2")
    assert (code, err) == (0, "")
    assert "recipe on t4: a step of 2 x 16 tokens" in out
    assert "verdict: fits" in out
    assert not Path("runs").exists()
    code, _, err = command("plan", "recipe.yaml", "--device", "t5")
    assert (code, err) == (
        2,
        "error: --device t5: unknown device; choose from a100-80g, cpu, h100, h200, t4\n",
    )
    code, _, err = command("plan", "recipe.yml", "--device", "t4")
    assert (code, err) == (2, "error: recipe.yml: no such recipe file\n")
    Path("teacher/config.json").unlink()
    code, _, err = command("plan", "recipe.yaml", "--device", "t4")
    assert (code, err) == (2, "error: 'teacher' has no config.json to plan from\n")
