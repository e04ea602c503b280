"""学生自己的词表，走真正的命令行：从零与由教师、文本与对话，恢复、评测、导出、几个进程。"""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import WORDS
from families import SENTENCES, build
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distillab.assembly import student_vocabulary
from distillab.config.recipes import load_recipe
from distillab.run_file_shapes import read_metrics

RECIPE = (
    "description: tiny\n"
    "teacher: {{path: teacher}}\n"
    "student: {{vocab: {{keep: corpus{vocab}}}, {student}}}\n"
    "data: {{source: {source}, max_seq_len: {length}}}\n"
    "train: {{batch_size: 4, max_steps: 8, warmup_steps: 2, learning_rate: 1e-2,\n"
    "        log_interval: 1, eval_interval: 4, save_interval: 4}}\n"
    "evaluate: {{prompts: [the teacher, 中国], max_new_tokens: 8}}\n"
)
SCRATCH = (
    "config: {hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "intermediate_size: 48, max_seq_len: 48}"
)
TEACHER = "init: {from: teacher, layers: 2}"


def write(name, student=SCRATCH, vocab="", source="text.jsonl", length=16, more=""):
    text = RECIPE.format(student=student, vocab=vocab, source=source, length=length)
    Path(f"{name}.yaml").write_text(text + more)


def train(command, name, *arguments):
    code, _, err = command("train", f"{name}.yaml", *arguments)
    assert code == 0, err
    return json.loads(Path(f"runs/{name}/summary.json").read_text()), " ".join(err.split())


def check_export(name):
    """transformers 自己读导出的目录，贪心地写出与样例相同的文字。"""
    model = AutoModelForCausalLM.from_pretrained(f"runs/{name}/export").eval()
    tokenizer = AutoTokenizer.from_pretrained(f"runs/{name}/export")
    assert model.config.vocab_size == len(tokenizer)
    rows = [
        json.loads(line) for line in Path(f"runs/{name}/samples.jsonl").read_text().splitlines()
    ]
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == row["student"]


@pytest.mark.parametrize("student", [SCRATCH, TEACHER], ids=["scratch", "teacher"])
def test_a_run_is_trimmed_resumed_evaluated_and_exported(workdir, command, monkeypatch, student):
    write("whole", student)
    summary, said = train(command, "whole")
    found = summary["vocabulary"]
    assert found["before"] == 400
    assert 256 < found["tokens"] < 390
    assert found["coverage"] == 1.0
    assert 0 < found["outside"] < 0.5
    assert f"the student's vocabulary: {found['tokens']} of 400 tokens, 100.0000%" in said
    assert f"gives {found['outside']:.3%} of its probability to tokens outside" in said
    check_export("whole")
    assert load_recipe("runs/whole/recipe.yaml").student.vocab is not None

    write("cut", student)
    shutil.copytree("runs/whole", "runs/cut")
    for left in ("summary.json", "export", "checkpoints/step-00000008", "checkpoints/best"):
        path = Path("runs/cut") / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe = Path("runs/cut/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("name: whole", "name: cut"))
    shutil.rmtree("cache/tokenizers")  # 恢复时不再数，也不再裁剪
    for counter in ("count_articles", "count_conversations"):
        monkeypatch.setattr(student_vocabulary, counter, None)
    again, _ = train(command, "cut", "--resume")
    assert again["vocabulary"] == found
    assert again["student_after"] == pytest.approx(summary["student_after"])

    code, _, err = command("evaluate", "whole")
    assert code == 0, err
    measured = json.loads(Path("runs/whole/evaluation.json").read_text())
    after = measured["texts"]["validation"]["models"]["student_after"]
    assert after["perplexity"]["value"] == pytest.approx(
        summary["student_after"]["perplexity"], rel=1e-4
    )
    code, _, err = command("export", "whole", "--output", "elsewhere")
    assert code == 0, err
    same = [Path(place) / "tokenizer.json" for place in ("elsewhere", "runs/whole/export")]
    assert same[0].read_bytes() == same[1].read_bytes()
    code, _, err = command("report", "whole")
    assert code == 0, err
    page = Path("runs/whole/report.html").read_text()
    assert f"{found['tokens']} of 400 tokens; {found['outside']:.2%}" in page
    shutil.rmtree("runs/whole/tokenizer")
    code, _, err = command("export", "whole", "--output", "third")
    assert code == 2
    assert "tokenizer is not the vocabulary of this run: " in " ".join(err.split())


def test_moved_mass_is_measured_alike_and_trained_on(workdir, command):
    steps = {}
    for rule in ("renormalise", "bucket"):
        write(rule, vocab=f", coverage: 0.9, outside: {rule}")
        summary, said = train(command, rule)
        steps[rule] = summary["vocabulary"], read_metrics(Path(f"runs/{rule}/metrics.jsonl"))
        done = "moved to their first piece" if rule == "bucket" else "renormalised"
        assert f"vocabulary: {done}" in said
    (kept, one), (moved, other) = steps.values()
    assert moved == pytest.approx(kept)
    assert kept["coverage"] < 1
    train_rows = [[row for row in rows if row["kind"] == "train"] for rows in (one, other)]
    assert train_rows[0][0]["divergence"] != pytest.approx(train_rows[1][0]["divergence"], rel=1e-3)
    assert train_rows[0][0]["cross_entropy"] == pytest.approx(train_rows[1][0]["cross_entropy"])


@pytest.fixture
def chat(workdir):
    rng = random.Random(0)
    rows = [
        {"messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=3))},
                      {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=4))}]}
        for _ in range(40)
    ]  # fmt: skip
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_sampled_responses_and_the_teachers_own_view(chat, command):
    write("views", TEACHER, source="chat.jsonl, format: chat, experience: Paris", length=48, more=(
        "loss: {alpha: 1.0, temperature: 1.0}\n"
        "responses: {student_fraction: 0.5}\n"
        "sampling: {max_new_tokens: 6}\n"
    ))  # fmt: skip
    summary, _ = train(command, "views")
    tokenizer = AutoTokenizer.from_pretrained("runs/views/tokenizer")
    paris = tokenizer.tokenize("Paris")  # 只有教师读到它
    full = AutoTokenizer.from_pretrained("teacher")
    assert paris == full.tokenize("Paris")
    assert "<|im_start|>" in tokenizer.get_vocab()
    assert summary["vocabulary"]["tokens"] == len(tokenizer)
    check_export_of_chat("views")


def check_export_of_chat(name):
    model = AutoModelForCausalLM.from_pretrained(f"runs/{name}/export").eval()
    tokenizer = AutoTokenizer.from_pretrained(f"runs/{name}/export")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert "<|im_end|>" in tokenizer.convert_ids_to_tokens(stops)


@pytest.mark.parametrize("student", ["path: teacher", "path: teacher, lora: {rank: 2}"])
def test_a_pretrained_student_is_trimmed_and_may_be_its_own_teacher(chat, command, student):
    write("whole", student, source="chat.jsonl, format: chat, experience: Paris", length=48)
    summary, said = train(command, "whole")
    assert ("without its adapters: no second copy" in said) == ("lora" in student)
    assert summary["vocabulary"]["outside"] > 0
    model = AutoModelForCausalLM.from_pretrained("runs/whole/export")
    assert model.config.vocab_size == summary["vocabulary"]["tokens"]


def test_a_trimmed_student_goes_on_with_the_whole_teacher(workdir, command):
    write("first")
    first, _ = train(command, "first")
    recipe = Path("first.yaml").read_text().replace(SCRATCH, "path: runs/first/export")
    Path("second.yaml").write_text(recipe.replace("vocab: {keep: corpus}, ", ""))
    second, said = train(command, "second")
    assert f"keeps the same {first['vocabulary']['tokens']} tokens" in said
    assert second["student_before"] == pytest.approx(first["student_after"], rel=1e-4)
    assert second["teacher"] == pytest.approx(first["teacher"])
    check_export("second")
    Path("third.yaml").write_text(recipe)
    code, _, err = command("train", "third.yaml")
    assert code == 2
    assert "was cut from the teacher's already; drop it" in " ".join(err.split())


def test_two_processes_keep_the_same_tokens(workdir, command, together):
    write("one")
    one, _ = train(command, "one")
    write("two")
    Path("two.yaml").write_text(
        Path("two.yaml").read_text().replace("batch_size: 4", "batch_size: 2")
    )
    together("train", "two.yaml")
    two = json.loads(Path("runs/two/summary.json").read_text())
    assert two["vocabulary"] == pytest.approx(one["vocabulary"])
    assert two["student_after"]["cross_entropy"] == pytest.approx(
        one["student_after"]["cross_entropy"], rel=1e-4
    )


def test_a_stream_is_counted_by_its_beginning(workdir, command):
    write("stream", source="text.jsonl, streaming: true")
    _, said = train(command, "stream")
    assert "counted of the stream's beginning" in said


@pytest.mark.parametrize(("student", "vocab", "expected"), [
    (SCRATCH, ", coverage: 0", "student.vocab.coverage: found 0, expected greater than 0"),
    (SCRATCH, ", coverage: 1.5", "student.vocab.coverage: found 1.5, expected less than or equal"),
    (SCRATCH, ", outside: drop", "student.vocab.outside: found 'drop'; choose from bucket"),
    (SCRATCH.replace("config: {", "config: {vocab_size: 77, "), "",
     "student.config.vocab_size=77 and student.vocab disagree: the trimmed vocabulary has"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(workdir, command, student, vocab, expected):
    write("bad", student, vocab)
    code, _, err = command("train", "bad.yaml")
    assert code == 2
    assert expected in " ".join(err.split())
    assert "Traceback" not in err


def test_what_is_kept_has_one_name(workdir, command):
    write("bad")
    Path("bad.yaml").write_text(Path("bad.yaml").read_text().replace("corpus", "all"))
    code, _, err = command("train", "bad.yaml")
    assert code == 2
    assert "student.vocab.keep: found 'all'; choose from corpus" in " ".join(err.split())


def test_a_tokenizer_of_another_kind_is_refused_before_the_models_are_read(workdir, command):
    backend = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=90, unk_token="<unk>", special_tokens=["<unk>", "<e>"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    shutil.rmtree("teacher")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained("teacher")
    write("pieces")
    code, _, err = command("train", "pieces.yaml")
    assert code == 2
    assert "student.vocab cannot trim this tokenizer: found a Unigram" in " ".join(err.split())


def test_a_tokenizer_with_byte_fallback_is_trimmed_too(workdir, command):
    shutil.rmtree("teacher")
    build("mistral", Path("teacher"))
    write("fallback")
    summary, _ = train(command, "fallback")
    assert summary["vocabulary"]["tokens"] < summary["vocabulary"]["before"]
    check_export("fallback")
