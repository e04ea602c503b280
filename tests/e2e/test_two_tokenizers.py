"""教师与学生的分词器不同：文本、对话、经验、on-policy，三种目标函数，都走真正的命令行。"""

import json
from pathlib import Path

import pytest
from run_files import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CONFIG = (
    "{hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 48, "
    "vocab_size: 320, max_seq_len: 64}"
)
RECIPE = (
    "description: tiny\n"
    "teacher: {{path: teacher}}\n"
    "student: {{tokenizer: ./other, config: "
    + CONFIG.replace("{", "{{").replace("}", "}}")
    + "}}\n"
    "data: {data}\n"
    "loss: {loss}\n"
    "train: {{batch_size: 4, max_steps: 6, warmup_steps: 1, learning_rate: 1e-2,\n"
    "        log_interval: 1, eval_interval: 6, save_interval: 6}}\n"
)
TEXT = "{source: text.jsonl, max_seq_len: 32}"


@pytest.fixture
def other(workdir):
    """``other/``：不到 320 个 token 的 BPE，别的模板，别的结束标记。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=317, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["what the students learn, softly the models give"] * 9, trainer)
    backend.add_special_tokens(["</s>", "<user>", "<bot>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{{ m.content }}</s>"
        "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    tokenizer.save_pretrained("other")
    return workdir


def write(name, loss="{divergence: alm, alpha: 0.5}", data=TEXT, more=""):
    Path(f"{name}.yaml").write_text(RECIPE.format(loss=loss, data=data) + more)
    return f"{name}.yaml"


def conversations(count=24, response=True):
    rows = []
    for i in range(count):
        turns = [{"role": "user", "content": f"what is item {i}?"}]
        if response:
            turns.append({"role": "assistant", "content": f"the model {i * 7}"[: 6 + i % 9]})
        rows.append({"messages": turns})
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CHAT = "{{source: chat.jsonl, format: chat, max_seq_len: 48{}}}"


def test_text_is_distilled_between_two_tokenizers(other, command):
    code, _, err = command("train", write("text"))
    assert code == 0, err
    said = " ".join(err.split())
    assert "response text between the two tokenizers:" in said
    assert "white space between the two tokenizers:" in said
    found = rows("text")
    for key in ("divergence", "cross_entropy"):
        assert 0 < found[-1][key] < found[0][key]
    summary = json.loads(Path("runs/text/summary.json").read_text())
    for model in ("teacher", "student_before", "student_after"):
        assert summary[model]["kl"] is summary[model]["top1_agreement"] is None
    bits = [summary[model]["bits_per_byte"] for model in ("student_after", "student_before")]
    assert 0 < bits[0] < bits[1]
    assert summary["alignment"]["text"]["all"]["left out"] < 0.2
    exported = AutoTokenizer.from_pretrained("runs/text/export")
    assert exported.get_vocab() == AutoTokenizer.from_pretrained("other").get_vocab()
    page = Path("runs/text/report.html").read_text()
    assert "bits per byte, validation" in page
    assert "tokenizers, white space" in page


def test_the_teacher_reads_experience_through_its_own_template(other, command):
    conversations()
    Path("experience.txt").write_text("red")
    data = CHAT.format(", packing: true, experience: experience.txt")
    code, _, err = command("train", write("chat", "{divergence: projected_kl, alpha: 0.5}", data))
    assert code == 0, err
    summary = json.loads(Path("runs/chat/summary.json").read_text())
    assert summary["alignment"]["tokens_left_out"] == 0  # 连同两边不同的结束标记
    found = rows("chat")
    assert found[-1]["cross_entropy"] < found[0]["cross_entropy"]
    code, _, err = command("evaluate", "chat")
    assert code == 0, err
    found = json.loads(Path("runs/chat/evaluation.json").read_text())
    models = found["texts"]["validation"]["models"]
    assert set(models) == {"teacher", "teacher_without", "student_before", "student_after"}
    assert all(model["bits_per_byte"]["value"] > 0 for model in models.values())
    assert models["teacher"]["bits_per_byte"] != models["teacher_without"]["bits_per_byte"]
    assert models["teacher"]["perplexity"]["value"] is None
    assert found["agreement"] == found["on_policy"] == {}


def test_the_students_own_samples_are_translated_for_the_teacher(other, command):
    conversations(response=False)  # 验证集由教师来回答
    more = "responses: {student_fraction: 1.0}\nsampling: {max_new_tokens: 8}\n"
    recipe = write("own", "{divergence: gold, alpha: 1.0}", CHAT.format(""), more)
    code, _, err = command("train", recipe)
    assert code == 0, err
    found = rows("own")
    assert all(row["rollout_responses"] == 4 for row in found)
    assert all(row["rollout_teacher_logprob"] < 0 for row in found)
    assert found[0]["divergence"] != 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": "{divergence: forward_kl}"}, "or loss.divergence: alm"),
        ({"loss": "{divergence: alm, temperature: 2.0}"},
         "loss: temperature=2 and divergence=alm disagree"),
        ({"loss": "{divergence: uld, tau: 10}"}, "loss: tau belongs to alm, but divergence is uld"),
        ({"loss": "{divergence: alm, tau: 0.5}"}, "loss: tau=0.5 must be at least 1"),
        ({"loss": "{divergence: gold, label_smoothing: 0.1}"},
         "loss: label_smoothing=0.1 and divergence=gold disagree"),
        ({"data": "{source: text.jsonl, packing: true}"},
         "data.packing and loss.divergence=alm disagree"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(other, command, changes, expected):
    code, _, err = command("train", write("refused", **changes))
    assert code == 2
    assert expected in " ".join(err.split())
    assert "Traceback" not in err


def test_copied_embeddings_need_the_teachers_tokenizer(other, command):
    text = (
        Path(write("copied"))
        .read_text()
        .replace(f"config: {CONFIG}", "init: {from: teacher, layers: 2}")
    )
    Path("copied.yaml").write_text(text)
    code, _, err = command("train", "copied.yaml")
    assert code == 2
    assert "student.init and student.tokenizer disagree with loss.divergence=alm" in err
