"""``distillab evaluate``：数字与独立算出的相同，文件合乎约定，错误一行说清。"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval_tasks import write_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from distillab.config.sections import LmEvalConfig
from distillab.data.chunks import WikiDataset
from distillab.evaluate.harness import evaluate_with_harness

RUN = Path("runs/recipe")
COLOURS = ["red", "green", "blue and black"]


def evaluation(path=RUN / "evaluation.json"):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def evaluated(command, *arguments):
    code, out, err = command("evaluate", "recipe", *arguments)
    assert code == 0, err
    return evaluation(), out


def nats(model, ids, predicted):
    """transformers 的模型在一条序列上：被预测的各个 token 的总 nat，float64。"""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in predicted)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


# ---------------------------------------------------------------------- 约定


def is_figure(found, *, known=True):
    assert set(found) == {"value", "low", "high"}
    if known:
        slack = 1e-9 * max(1, abs(found["value"]))
        assert found["low"] - slack <= found["value"] <= found["high"] + slack


def check_contract(found):
    assert set(found) == {
        "format", "name", "checkpoint", "created", "seed", "bootstrap_samples", "frequency_counts",
        "environment", "models", "texts", "agreement", "on_policy", "tasks", "lm_eval", "samples",
    }  # fmt: skip
    assert found["format"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])
    assert found["bootstrap_samples"] == 1000
    assert "packages" in found["environment"]
    models = set(found["models"])
    for model in found["models"].values():
        assert set(model) == {"label", "source", "parameters", "view", "dtype"}
        assert model["view"] in ("same", "privileged")
        assert model["parameters"] > 0
    for data in found["texts"].values():
        assert set(data) == {"sha256", "sequences", "tokens", "bytes", "models", "gap_closed"}
        assert len(data["sha256"]) == 64
        assert set(data["models"]) <= models
        for one in data["models"].values():
            assert set(one) == {"perplexity", "cross_entropy", "bits_per_byte", "items_per_second"}
            known = one["perplexity"]["value"] is not None
            is_figure(one["perplexity"], known=known)
            is_figure(one["cross_entropy"], known=known)
            is_figure(one["bits_per_byte"])
            assert one["items_per_second"] > 0
    for name, by_model in found["agreement"].items():
        tokens = found["texts"][name]["tokens"]
        assert set(by_model) == set(found["texts"][name]["models"]) - {"teacher"}
        for one in filter(None, by_model.values()):
            parts = {"forward_kl", "reverse_kl", "top1", "top5"}
            assert set(one) == parts | {"by_position", "by_frequency"}
            for part in parts:
                is_figure(one[part])
            for kind, keys in (("by_position", {"from", "to"}), ("by_frequency", {"band"})):
                assert sum(band["tokens"] for band in one[kind]) == tokens
                for part in parts:
                    total = sum(band["tokens"] * band[part] for band in one[kind])
                    assert total / tokens == pytest.approx(one[part]["value"], rel=1e-9, abs=1e-12)
                assert all(set(band) == {"tokens", *parts, *keys} for band in one[kind])
    for one in found["on_policy"].values():
        assert set(one) == {"forward_kl", "reverse_kl", "top1", "tokens", "sequences"}
        assert one["tokens"] >= one["sequences"] > 0
        for part in ("forward_kl", "reverse_kl", "top1"):
            is_figure(one[part])
    for task in found["tasks"].values():
        assert set(task) == {"items", "sha256", "models", "gap_closed", "differences"}
        for one in task["models"].values():
            assert set(one) == {"accuracy", "correct", "items_per_second"}
            is_figure(one["accuracy"])
            assert one["accuracy"]["value"] == one["correct"] / task["items"]
        for difference in task["differences"]:
            is_figure(difference["difference"])
            a, b = (task["models"][name]["accuracy"]["value"] for name in difference["models"])
            assert difference["difference"]["value"] == pytest.approx(a - b)
    for sample in found["samples"]:
        assert set(sample) == {"prompt", "teacher", "student_before", "student_after"}


# ---------------------------------------------------------------------- 文本


def test_perplexities_on_text_equal_those_computed_with_transformers(command):
    assert command("train", "recipe.yaml")[0] == 0
    before = {path for path in RUN.rglob("*") if path.is_file()}
    found, out = evaluated(command)
    assert {path for path in RUN.rglob("*") if path.is_file()} - before == {RUN / "evaluation.json"}
    check_contract(found)
    assert list(found["models"]) == ["teacher", "student_before", "student_after"]
    assert found["checkpoint"] == "best (step-00000012)"
    text = found["texts"]["validation"]
    assert (text["sequences"], text["tokens"]) == (30, 450)
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    _, validation = WikiDataset.build("text.jsonl", tokenizer, max_seq_len=16)
    chunks = [item["input_ids"].tolist() for item in validation]
    letters = sum(len(tokenizer.decode(ids[1:], skip_special_tokens=True)) for ids in chunks)
    assert text["bytes"] == letters  # 全是 ASCII
    for name, path in (("teacher", "teacher"), ("student_after", RUN / "export")):
        model, figures = load(path), text["models"][name]
        total = sum(nats(model, ids, range(1, 16)) for ids in chunks)
        assert figures["perplexity"]["value"] == pytest.approx(math.exp(total / 450), rel=1e-4)
        bits = total / math.log(2) / letters
        assert figures["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
        assert f"{figures['perplexity']['value']:,.1f}" in out
    summary = json.loads((RUN / "summary.json").read_text())
    for name in ("teacher", "student_before", "student_after"):
        perplexity = text["models"][name]["perplexity"]["value"]
        assert perplexity == pytest.approx(summary[name]["perplexity"], rel=1e-5)
    for name in ("student_before", "student_after"):
        agreement = found["agreement"]["validation"][name]
        assert agreement["forward_kl"]["value"] == pytest.approx(summary[name]["kl"], rel=1e-4)
        assert agreement["top1"]["value"] == pytest.approx(summary[name]["top1_agreement"])
    samples = [json.loads(line) for line in (RUN / "samples.jsonl").read_text().splitlines()]
    assert [row["student_after"] for row in found["samples"]] == [row["student"] for row in samples]
    assert found["samples"][0]["teacher"] != found["samples"][0]["student_before"]
    assert max(map(len, out.splitlines())) <= 80


def values(found, path=()):
    """一份 ``evaluation.json`` 里的每个数，速度与版本除外。"""
    if isinstance(found, dict):
        for key, value in found.items():
            if key not in ("items_per_second", "environment", "created"):
                yield from values(value, (*path, key))
    elif isinstance(found, list):
        for position, value in enumerate(found):
            yield from values(value, (*path, position))
    else:
        yield path, found


def test_batch_size_changes_no_figure(chat, command):
    assert command("train", "recipe.yaml")[0] == 0
    first = dict(values(evaluated(command)[0]))
    recipe = yaml.safe_load((RUN / "recipe.yaml").read_text())
    recipe["evaluate"]["batch_size"] = 3
    (RUN / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    second = dict(values(evaluated(command)[0]))
    assert first.keys() == second.keys()
    for path, value in first.items():
        if isinstance(value, float):
            assert second[path] == pytest.approx(value, rel=1e-5, abs=1e-6), path
        else:
            assert second[path] == value, path


def test_another_model_is_measured_on_the_same_tokens_and_one_equal_to_the_teacher_agrees(command):
    assert command("train", "recipe.yaml")[0] == 0
    texts = ("evaluate.texts={words: {source: text.jsonl, max_seq_len: 12, max_sequences: 5}}",)
    assert command("train", str(RUN / "recipe.yaml"), "--resume", "--set", *texts)[0] == 0
    found, out = evaluated(command, "--model", "recipe", "--model", "./teacher",
                           "--checkpoint", "step-00000008")  # fmt: skip
    check_contract(found)
    assert found["checkpoint"] == "step-00000008"
    assert found["models"]["recipe"]["source"] == "runs/recipe/export"
    for name in ("validation", "words"):
        figures, agreement = found["texts"][name]["models"], found["agreement"][name]
        assert set(figures) == {"teacher", "student_before", "student_after", "recipe", "./teacher"}
        assert figures["./teacher"]["perplexity"] == figures["teacher"]["perplexity"]
        assert agreement["./teacher"]["forward_kl"]["value"] == 0
        assert agreement["./teacher"]["top5"] == {"value": 1, "low": 1, "high": 1}
        # 导出的是 best（第 12 步），量的是第 8 步。
        assert figures["recipe"]["perplexity"] != figures["student_after"]["perplexity"]
        assert f"{name}: " in out
    assert found["texts"]["words"]["sequences"] == 5
    assert found["on_policy"]["./teacher"]["forward_kl"]["value"] == 0
    assert found["on_policy"]["student_after"]["forward_kl"]["value"] > 0
    assert found["on_policy"]["student_after"]["sequences"] == 30


def test_gap_closed_is_the_share_of_the_difference_in_nats(command):
    """学生与教师换了位置，教师才比训练前的学生好。"""
    assert command("train", "recipe.yaml", "--set", "name=good")[0] == 0
    swapped = ("--set", "teacher.path=runs/good/export", "--set", "student.init=null",
               "--set", "student.path=teacher")  # fmt: skip
    assert command("train", "recipe.yaml", *swapped)[0] == 0
    found, out = evaluated(command)
    text = found["texts"]["validation"]
    teacher, before, after = (
        text["models"][name]["cross_entropy"]["value"]
        for name in ("teacher", "student_before", "student_after")
    )
    assert text["gap_closed"]["value"] == pytest.approx((before - after) / (before - teacher))
    is_figure(text["gap_closed"])
    assert f"gap closed: {text['gap_closed']['value']:.1%} [" in out


def test_run_without_a_teacher_has_perplexities_alone(command):
    Path("recipe.yaml").write_text(
        "student: {path: teacher}\nloss: {alpha: 0.0}\n"
        "data: {source: text.jsonl, max_seq_len: 16}\n"
        "train: {batch_size: 4, max_steps: 3, warmup_steps: 1}\n"
    )
    assert command("train", "recipe.yaml")[0] == 0
    found, _ = evaluated(command)
    check_contract(found)
    assert set(found["models"]) == {"student_before", "student_after"}
    assert (found["agreement"], found["on_policy"], found["samples"]) == ({}, {}, [])
    assert found["texts"]["validation"]["gap_closed"] is None


def test_adapters_are_off_before_training_and_for_a_teacher_that_is_the_base(command):
    lora = (
        "--set",
        "student.init=null",
        "--set",
        "student.path=teacher",
        "--set",
        "student.lora={rank: 2}",
        "--set",
        "train.max_steps=6",
    )
    assert command("train", "recipe.yaml", *lora)[0] == 0
    found, _ = evaluated(command)
    check_contract(found)
    models, agreement = found["texts"]["validation"]["models"], found["agreement"]["validation"]
    assert models["student_before"]["perplexity"] == models["teacher"]["perplexity"]
    assert agreement["student_before"]["forward_kl"]["value"] == 0
    assert agreement["student_after"]["forward_kl"]["value"] > 0
    parameters = {name: model["parameters"] for name, model in found["models"].items()}
    assert parameters["teacher"] == parameters["student_before"] < parameters["student_after"]


# ---------------------------------------------------------------------- 对话，教师有经验


def conversation(number, experience):
    colour = COLOURS[number * 7 % 3]
    system = [{"role": "system", "content": colour}] * experience
    turns = [{"role": "user", "content": f"item {number}?"}]
    reply = [{"role": "assistant", "content": colour}]
    return {"id": f"t{number}", "messages": system + turns + reply, "answer": colour}


@pytest.fixture
def chat(workdir, tiny_tokenizer):
    """成对的数据：学生与教师的权重相同，教师多读一条 system。"""
    for name, experience in (("plain", False), ("knowing", True)):
        rows = (json.dumps(conversation(i, experience)) + "\n" for i in range(30))
        Path(f"{name}.jsonl").write_text("".join(rows))
    Path("recipe.yaml").write_text(
        "teacher: {path: teacher}\nstudent: {path: teacher}\n"
        "data: {source: plain.jsonl, teacher_source: knowing.jsonl, format: chat,\n"
        "       validation_fraction: 0.4}\n"
        "loss: {alpha: 1.0, temperature: 1.0}\n"
        "sampling: {max_new_tokens: 5, temperature: 0.9}\n"
        "train: {batch_size: 4, max_steps: 6, warmup_steps: 1, learning_rate: 3e-3,\n"
        "        num_epochs: 20}\n"
        "evaluate:\n"
        "  max_new_tokens: 4\n"
        "  tasks: {colours: {source: plain.jsonl, teacher_source: knowing.jsonl,\n"
        "                    match: {regex: '.'}, max_new_tokens: 4}}\n"
        "  texts: {words: {source: text.jsonl, max_seq_len: 16, max_sequences: 8}}\n"
    )
    return workdir


def rendered(tokenizer, messages):
    """按模板写出的整段对话：``(token, 被预测的位置)``；response 含 ``<|im_end|>``。"""
    prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
    prompt += "<|im_start|>assistant\n"
    response = messages[-1]["content"] + "<|im_end|>"
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, response))
    return before + after, range(len(before), len(before) + len(after))


def test_paired_chat_run_equals_transformers_on_response_tokens_of_both_views(chat, command):
    assert command("train", "recipe.yaml")[0] == 0
    found, out = evaluated(command)
    check_contract(found)
    views = {name: model["view"] for name, model in found["models"].items()}
    assert views == {"teacher": "privileged", "teacher_without": "same",
                     "student_before": "same", "student_after": "same"}  # fmt: skip
    validation = found["texts"]["validation"]
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    held_out = held_out_ids(validation["sequences"])
    base, after = load("teacher"), load(RUN / "export")
    for name, model, experience in (
        ("teacher", base, True), ("teacher_without", base, False),
        ("student_before", base, False), ("student_after", after, False),
    ):  # fmt: skip
        parts = [
            rendered(tokenizer, conversation(number, experience)["messages"]) for number in held_out
        ]
        totals = [nats(model, ids, predicted) for ids, predicted in parts]
        counts = [len(predicted) for _, predicted in parts]
        assert sum(counts) == validation["tokens"]
        perplexity = math.exp(sum(totals) / sum(counts))
        figures = validation["models"][name]
        assert figures["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)
        # 长短不一：各条困惑度的平均是另一个数。
        means = [math.exp(total / count) for total, count in zip(totals, counts, strict=True)]
        assert sum(means) / len(means) != pytest.approx(perplexity, rel=1e-3)
    assert validation["bytes"] == sum(
        len(conversation(number, False)["answer"]) for number in held_out
    )
    # 同样的权重读同样的 prompt。
    same = found["agreement"]["validation"]
    assert same["teacher_without"] == same["student_before"]
    assert same["student_before"]["forward_kl"]["value"] > 0
    # 文本没有经验可去掉。
    assert "teacher_without" not in found["texts"]["words"]["models"]
    assert found["agreement"]["words"]["student_before"]["forward_kl"]["value"] == 0
    task = found["tasks"]["colours"]
    assert task["items"] == 30
    assert [difference["models"] for difference in task["differences"]] == [
        ["student_after", "teacher"], ["student_after", "teacher_without"],
        ["student_after", "student_before"], ["teacher", "teacher_without"],
    ]  # fmt: skip
    assert [sample["prompt"] for sample in found["samples"]] == ["item 0?", "item 1?", "item 2?"]
    assert {"student_before", "student_after"} == set(found["on_policy"])
    assert "colours: 30 items" in out
    assert max(map(len, out.splitlines())) <= 80


def held_out_ids(count):
    """验证集里的对话：由训练集的划分得来，次序无关紧要。"""
    from distillab.config.sections import DataSection
    from distillab.data.chat_dataset import ChatDataset
    from distillab.data.pairs import load_pairs

    data = DataSection(source="plain.jsonl", format="chat", validation_fraction=0.4)
    pairs, _ = load_pairs(data)
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    _, validation, _ = ChatDataset.build(pairs, data, tokenizer, max_seq_len=64)
    texts = [tokenizer.decode(example.student.ids) for example in validation]
    numbers = [int(re.search(r"item (\d+)\?", text)[1]) for text in texts]
    assert len(numbers) == count
    return numbers


# ---------------------------------------------------------------------- 别的 tokenizer


@pytest.fixture
def stranger(tmp_path_factory):
    """另一个 tokenizer、另一种结构的模型；文章的分隔也叫别的名字。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["teacher student model targets"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    torch.manual_seed(1)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, vocab_size=280,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "stranger"
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_model_with_another_tokenizer_is_compared_by_bits_per_byte_of_the_same_text(
    command, stranger
):
    assert command("train", "recipe.yaml")[0] == 0
    found, out = evaluated(command, "--model", str(stranger))
    check_contract(found)
    ours, other = found["texts"]["validation"], AutoTokenizer.from_pretrained(stranger)
    figures = ours["models"][str(stranger)]
    assert figures["perplexity"] == {"value": None, "low": None, "high": None}
    assert found["agreement"]["validation"][str(stranger)] is None
    assert str(stranger) not in found["on_policy"]
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    _, validation = WikiDataset.build("text.jsonl", tokenizer, max_seq_len=16)

    def translated(ids):
        text = tokenizer.decode(ids).replace("<|endoftext|>", "</s>")
        return other(text, add_special_tokens=False)["input_ids"]

    model, total = load(stranger), 0.0
    for item in validation:
        ids = item["input_ids"].tolist()
        before, after = translated(ids[:1]), translated(ids[1:])
        total += nats(model, before + after, range(len(before), len(before) + len(after)))
    bits = total / math.log(2) / ours["bytes"]
    assert figures["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
    assert f"{bits:.3f}" in out


def test_model_with_another_tokenizer_reads_conversations_by_its_own_template(
    chat, command, stranger
):
    assert command("train", "recipe.yaml")[0] == 0
    found, _ = evaluated(command, "--model", str(stranger))
    check_contract(found)
    tokenizer, model = AutoTokenizer.from_pretrained(stranger), load(stranger)
    total = 0.0
    for number in held_out_ids(found["texts"]["validation"]["sequences"]):
        answer = conversation(number, False)["answer"]
        prompt = f"[user] item {number}?</s>[assistant] "
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, f"{answer}</s>"))
        total += nats(model, before + after, range(len(before), len(before) + len(after)))
    figures = found["texts"]["validation"]["models"][str(stranger)]
    bits = total / math.log(2) / found["texts"]["validation"]["bytes"]
    assert figures["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
    assert found["tasks"]["colours"]["models"][str(stranger)]["items_per_second"] > 0


def test_responses_that_the_teacher_wrote_are_evaluated_by_its_own_tokens_only(
    chat, command, stranger
):
    """数据只有 prompt：验证的 response 由教师来答，别的 tokenizer 无从得到同样的文字。"""
    for name in ("plain.jsonl", "knowing.jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        asked = (json.dumps(row | {"messages": row["messages"][:-1]}) + "\n" for row in rows)
        Path(name).write_text("".join(asked))
    sampled = ("--set", "responses.student_fraction=1.0", "--set", "train.max_steps=2")
    assert command("train", "recipe.yaml", *sampled)[0] == 0
    found, _ = evaluated(command)
    check_contract(found)
    summary = json.loads((RUN / "summary.json").read_text())
    teacher = found["texts"]["validation"]["models"]["teacher"]["perplexity"]["value"]
    assert teacher == pytest.approx(summary["teacher"]["perplexity"], rel=1e-5)
    code, _, err = command("evaluate", "recipe", "--model", str(stranger))
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: --model {stranger}: it has another tokenizer, and with its chat template the "
        f"validation responses are not the same text: drop it"
    )


# ---------------------------------------------------------------------- 写到哪里，写错了什么


def test_output_goes_where_it_is_told_and_a_failure_leaves_the_old_file(command):
    assert command("train", "recipe.yaml")[0] == 0
    code, out, _ = command("evaluate", "recipe", "--output", "numbers.json")
    assert (code, out.splitlines()[-1]) == (0, "written: numbers.json")
    check_contract(evaluation("numbers.json"))
    assert not (RUN / "evaluation.json").exists()
    (RUN / "evaluation.json").write_text("older")
    assert command("evaluate", "recipe", "--model", "./text.jsonl")[0] == 2
    assert (RUN / "evaluation.json").read_text() == "older"


ERRORS = {
    "same name": (("--model", "teacher"), None,
        "--model teacher: the run's own model has this name; write ./teacher"),
    "twice": (("--model", "./teacher", "--model", "./teacher"), None,
        "--model ./teacher is given twice"),
    "no such model": (("--model", "./techer"), None,
        "'./techer' does not exist; did you mean 'teacher'?"),
    "not a model": (("--model", "./text.jsonl"), None,
        "'text.jsonl' is not a model: expected a directory with config.json and safetensors, or a "
        ".gguf file"),
    "output nowhere": (("--output", "no/where.json"), None,
        "--output no/where.json: there is no directory no"),
    "text too short": ((), "short: {source: text.jsonl, max_seq_len: 3000}",
        "evaluate.texts.short: the validation split has 485 tokens, less than one chunk of "
        "max_seq_len=3000; give more text (size_mb) or a smaller max_seq_len"),
    "text longer than a model reads": ((), "long: {source: text.jsonl, max_seq_len: 65}",
        "long: a sequence has 65 tokens, but teacher reads at most 64"),
    "text with the name of the validation data": ((), "validation: {source: text.jsonl}",
        "evaluate.texts.validation: this name is the run's own validation data; name the text "
        "differently"),
}  # fmt: skip


@pytest.fixture
def trained(command):
    assert command("train", "recipe.yaml")[0] == 0


def test_mistakes_end_in_one_line(command, trained):
    saved = (RUN / "recipe.yaml").read_text()
    for name, (arguments, text, expected) in ERRORS.items():
        recipe = yaml.safe_load(saved)
        recipe["evaluate"]["texts"] = {} if text is None else yaml.safe_load(text)
        (RUN / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        code, out, err = command("evaluate", "recipe", *arguments)
        found = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found == [f"error: {expected}"], name
        assert (code, out) == (2, ""), name
        assert "Traceback" not in err
    assert not (RUN / "evaluation.json").exists()


# ---------------------------------------------------------------------- lm-evaluation-harness


def test_harness_tasks_are_measured_for_every_model_with_intervals(command, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("datasets").resolve()))
    directory = write_tasks(Path("tasks"))
    section = f"evaluate.lm_eval={{tasks: [tiny_choose, tiny_words], include_path: {directory}}}"
    assert command("train", "recipe.yaml", "--set", section)[0] == 0
    found, out = evaluated(command)
    check_contract(found)
    assert set(found["lm_eval"]) == {"tiny_choose", "tiny_words"}
    choose, words = found["lm_eval"]["tiny_choose"], found["lm_eval"]["tiny_words"]
    assert list(choose["models"]) == ["teacher", "student_before", "student_after"]
    assert f"lm-eval tiny_choose: {choose['items']} items, 0-shot" in out
    exported = evaluate_with_harness(
        str(RUN / "export"), None, LmEvalConfig(tasks=["tiny_choose"], include_path=str(directory))
    )["tasks"]["tiny_choose"]
    for metric, value in exported["metrics"].items():
        figure = choose["models"]["student_after"][metric]
        is_figure(figure)
        assert figure["value"] == pytest.approx(value)
    for one in choose["differences"]:
        a, b = (choose["models"][name][one["metric"]]["value"] for name in one["models"])
        assert one["difference"]["value"] == pytest.approx(a - b)
    assert {tuple(one["models"]) for one in choose["differences"]} == {
        ("student_after", "teacher"), ("student_after", "student_before")
    }  # fmt: skip
    perplexity = words["models"]["teacher"]["word_perplexity"]
    assert perplexity["value"] > 1
    assert perplexity["low"] is None  # 不是每题的平均
    assert words["differences"] == []
