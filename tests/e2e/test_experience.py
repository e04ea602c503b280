"""把经验放进权重：成对的数据、合成、SeqKD、SKD 与 on-policy，都走真正的命令行。"""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from kept_rows import kept_rows
from transformers import Qwen2Config, Qwen2ForCausalLM

from distillab.batch import collate_examples
from distillab.config.sections import DataSection
from distillab.data.chat_dataset import ChatDataset
from distillab.data.conversations import parse_conversation
from distillab.data.pairs import Pair
from distillab.models.interface import PretrainedLM
from distillab.run_file_shapes import read_metrics

COLOURS = ["red", "green", "blue", "black"]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def conversation(number, *, experience, reply=True):
    """颜色写在经验里；没有经验，只能猜。"""
    colour = COLOURS[number * 7 % 4]
    system = [{"role": "system", "content": f"the colour is {colour}"}]
    turns = [{"role": "user", "content": f"colour of item {number}?"}]
    answer = [{"role": "assistant", "content": colour}]
    messages = system * experience + turns + answer * reply
    return {"id": f"t{number}", "messages": messages, "answer": colour}


@pytest.fixture(scope="module")
def knowing_teacher(tmp_path_factory, tiny_tokenizer):
    """一个真能读懂经验的小教师：在带经验的对话上训练几秒。"""
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, vocab_size=400, max_position_embeddings=128,
        tie_word_embeddings=True, eos_token_id=397,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    student = PretrainedLM(model)
    pairs = [
        Pair(one, one)
        for number in range(400)
        for one in [parse_conversation(conversation(number, experience=True), "row")]
    ]
    data = DataSection(source="memory", format="chat")
    examples, _, _ = ChatDataset.build(pairs, data, tiny_tokenizer, max_seq_len=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        batch = collate_examples([examples[(step * 16 + i) % len(examples)] for i in range(16)], 0)
        view = batch.student
        hidden = view.rows(student(view.input_ids, view.attention_mask))
        loss = torch.nn.functional.cross_entropy(student.head.logits(hidden), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("models") / "teacher"
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def paired(workdir, knowing_teacher):
    """两份 jsonl：同样的任务，带与不带经验；``recipe.yaml`` 是 SKD。"""
    Path("plain.jsonl").write_text(lines(conversation(i, experience=False) for i in range(40)))
    Path("knowing.jsonl").write_text(lines(conversation(i, experience=True) for i in range(40)))
    Path("recipe.yaml").write_text(
        f"teacher: {{path: {knowing_teacher}, dtype: float32}}\n"
        f"student: {{path: {knowing_teacher}}}\n"
        "data: {source: plain.jsonl, teacher_source: knowing.jsonl, format: chat}\n"
        "loss: {alpha: 0.9, temperature: 1.0}\n"
        "sampling: {max_new_tokens: 6, temperature: 0.9}\n"
        "synthesize: {sampling: {temperature: 0.0, max_new_tokens: 8}, batch_size: 4}\n"
        "train: {batch_size: 4, max_steps: 12, warmup_ratio: 0.1, learning_rate: 1e-3,\n"
        "        log_interval: 1, eval_interval: 6, save_interval: 4, num_epochs: 20}\n"
        "evaluate:\n"
        "  tasks: {colours: {source: plain.jsonl, teacher_source: knowing.jsonl,\n"
        "                    match: {exact: true}, max_new_tokens: 8}}\n"
        "  texts: {words: {source: text.jsonl, max_seq_len: 16, max_sequences: 8}}\n"
    )
    return workdir


def train_rows(run="runs/recipe"):
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "train"]


def test_privileged_distillation_leaves_checks_before_and_after(paired, command):
    code, out, err = command("train", "recipe.yaml")
    assert code == 0, err
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    colours = summary["tasks"]["colours"]
    assert colours["teacher"] > 0.9
    assert colours["student_before"] < 0.5
    gap = (colours["student_after"] - colours["student_before"]) / (
        colours["teacher"] - colours["student_before"]
    )
    assert colours["gap_closed"] == pytest.approx(gap)
    assert set(summary["texts"]["words"]) == {"teacher", "student_before", "student_after"}
    assert summary["texts"]["words"]["student_before"] == summary["texts"]["words"]["teacher"]
    for model in ("teacher", "student_before", "student_after"):
        path = Path(f"runs/recipe/checks/colours.{model}.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 40
        assert sum(row["correct"] for row in rows) / 40 == colours[model]
        assert all(row["correct"] == (row["answer"] == row["response"]) for row in rows)
    # 教师读到的不同，所以同样的权重也有分歧；训练使它变小。
    assert summary["student_before"]["kl"] > 0
    assert summary["student_after"]["kl"] < summary["student_before"]["kl"]
    assert "colours" in out
    before = sorted(path.name for path in Path("runs/recipe/checks").iterdir())
    code, again, _ = command("evaluate", "recipe")
    assert code == 0
    assert f"{colours['student_after']:.1%}" in again
    assert sorted(path.name for path in Path("runs/recipe/checks").iterdir()) == before
    assert max(map(len, out.splitlines())) <= 80
    assert "36 for training, 4 for validation" in re.sub(r"\s+", " ", err)


def test_synthesize_then_seqkd(paired, command, knowing_teacher):
    code, out, err = command("synthesize", "recipe.yaml")
    assert code == 0, err
    assert "asked 40, kept 40" in out
    assert all(row["response"] in COLOURS for row in kept_rows(Path("responses.jsonl")))
    before = Path("responses.jsonl").read_bytes()
    assert len(kept_rows(Path("responses.jsonl"))) == 40
    assert command("synthesize", "recipe.yaml")[0] == 0  # 什么都不用再问
    assert Path("responses.jsonl").read_bytes() == before
    provenance = json.loads(Path("responses.jsonl.provenance.json").read_text())
    assert provenance["teacher"] == {
        "path": str(knowing_teacher), "sha256": None, "dtype": "float32", "template_options": {},
    }  # fmt: skip
    code, _, err = command(
        "train", "recipe.yaml", "--set", "data.responses=responses.jsonl", "--set", "loss.alpha=0"
    )
    assert code == 0, err
    rows = train_rows()
    assert all(row["divergence"] == 0 and row["loss"] == row["cross_entropy"] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_train_says_how_to_get_missing_responses(paired, command):
    code, _, err = command("train", "recipe.yaml", "--set", "data.responses=responses.jsonl")
    assert code == 2
    assert err.count("\n") == 1
    assert "'responses.jsonl' does not exist; write it with: distillab synthesize" in err


def test_on_policy_run_reports_its_rollouts(paired, command):
    code, _, err = command(
        "train", "recipe.yaml", "--set", "responses.student_fraction=0.5", "--set", "loss.alpha=1",
        "--set", "loss.divergence=jsd",
    )  # fmt: skip
    assert code == 0, err
    rows = train_rows()
    sampled = [row for row in rows if "rollout_responses" in row]
    assert 0 < len(sampled) < len(rows)  # 有的步采样，有的步不
    assert all(row["rollout_responses"] == 4 for row in sampled)
    assert all(1 <= row["rollout_length"] <= 6 for row in sampled)


def test_lora_student_is_its_own_teacher(paired, command):
    code, _, err = command(
        "train", "recipe.yaml", "--set", "student.lora.rank=2", "--set", "train.learning_rate=1e-2"
    )
    assert code == 0, err
    assert "no second copy" in err
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    assert summary["texts"]["words"]["teacher"] == summary["texts"]["words"]["student_before"]
    before, after = summary["student_before"]["kl"], summary["student_after"]["kl"]
    assert 0 < after < before


def test_synthesis_that_was_killed_goes_on_without_repeating_or_losing_a_row(paired, start):
    arguments = [
        "synthesize", "recipe.yaml", "--set", "synthesize.samples=30", "--set",
        "synthesize.sampling.temperature=1.0",
    ]  # fmt: skip
    output = Path("responses.jsonl")

    def written():
        return output.read_bytes().count(b"\n") if output.exists() else 0

    process = start(*arguments)
    deadline = time.monotonic() + 120
    while written() < 40 and time.monotonic() < deadline:
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = output.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 40 <= kept.count(b"\n") < 1200

    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert output.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(row["id"], row["sample"]) for row in rows} == {
        (f"t{number}", sample) for number in range(40) for sample in range(30)
    }
    assert len(rows) == 1200
    assert "asked 1,200, kept 1,200" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_synthesis_says_how_to_go_on(paired, start, number, code):
    process = start(
        "synthesize", "recipe.yaml", "--set", "synthesize.samples=200", "--set",
        "synthesize.sampling.temperature=1.0",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not Path("responses.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    last = err.splitlines()[-1]
    assert re.fullmatch(
        r"stopped: [\d,]+ of 8,000 answers are in responses\.jsonl; run the same command again to "
        r"continue", last
    )  # fmt: skip
    assert "Traceback" not in err


def test_prompts_alone_are_enough_when_every_response_is_sampled(paired, command):
    for name in ("plain.jsonl", "knowing.jsonl"):
        records = [json.loads(line) for line in Path(name).read_text().splitlines()]
        for record in records:
            del record["messages"][-1]
        Path(name).write_text(lines(records))
    changes = ["--set", "loss.alpha=1", "--set", "loss.divergence=jsd", "--set"]
    code, _, err = command("train", "recipe.yaml", *changes, "responses.student_fraction=0.5")
    assert code == 2  # 有的步要数据里的 response
    assert "no response" in err
    code, _, err = command("train", "recipe.yaml", *changes, "responses.student_fraction=1.0")
    assert code == 0, err
    assert "the teacher answers the 4 validation prompts that have no response" in err
    summary = json.loads(Path("runs/recipe/summary.json").read_text())
    # 教师贪心写的 response，教师自己的困惑度接近 1。
    assert summary["teacher"]["perplexity"] < 1.5 < summary["student_before"]["perplexity"]


def test_a_chat_run_answers_questions(paired, command):
    code, out, err = command(
        "train", "recipe.yaml", "--set", "evaluate.prompts=['colour of item 3?']", "--set",
        "train.max_steps=1", "--set", "evaluate.max_new_tokens=8",
    )  # fmt: skip
    assert code == 0, err
    sample = json.loads(Path("runs/recipe/samples.jsonl").read_text())
    assert sample["student"] in COLOURS  # 经了模板，学生知道这是要它回答
    arguments = ["recipe", "--prompt", "colour of item 3?", "--max-new-tokens", "8"]
    code, out, _ = command("generate", *arguments, "--chat")
    assert code == 0
    assert out == f"colour of item 3?\n{sample['student']}\n"
    assert command("generate", *arguments)[1] != out
