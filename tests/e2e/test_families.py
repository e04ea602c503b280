"""六家模型各走一遍：文本、对话、合成、on-policy、导出；数与 transformers 自己的相同。"""

import json
import math
from pathlib import Path

import families
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillab.data.chunks import WikiDataset
from distillab.models.tokenizer import load_tokenizer
from distillab.run import load_generator
from distillab.run_file_shapes import read_metrics

pytestmark = pytest.mark.slow

QUESTIONS = [f"The capital of country {number}?" for number in range(12)]
ANSWER = "Paris, 北京."
TEXT = """
teacher: {path: model, dtype: float32}
student: {path: model}
data: {source: text.jsonl, max_seq_len: 32}
train: {batch_size: 4, max_steps: 2, warmup_steps: 0, learning_rate: 1e-3, precision: fp32}
evaluate: {prompts: ["The capital"], max_new_tokens: 8}
"""
WHOLE = """
teacher: {path: model, dtype: float32}
student: {init: {from: teacher, layers: 2}}
data: {source: text.jsonl, max_seq_len: 32}
train: {batch_size: 4, max_steps: 2, warmup_steps: 0, learning_rate: 1e-3, precision: fp32}
evaluate: {prompts: ["The capital"], max_new_tokens: 8}
"""
CHAT = """
student: {path: model}
data: {source: chat.jsonl, format: chat, max_seq_len: 128}
loss: {alpha: 0}
train: {batch_size: 4, max_steps: 60, num_epochs: 30, warmup_steps: 5, learning_rate: 1e-2,
        precision: fp32, eval_interval: 60}
evaluate:
  prompts: []
  tasks: {capitals: {source: asked.jsonl, match: {exact: true}, max_new_tokens: 24}}
"""
ON_POLICY = """
teacher: {path: runs/chat/export, dtype: float32}
student: {path: model}
data: {source: asked.jsonl, format: chat, max_seq_len: 128, responses: responses.jsonl,
       experience: "Every capital is Paris.", experience_role: user}
responses: {student_fraction: 0.5}
sampling: {temperature: 1.0, max_new_tokens: 12}
loss: {alpha: 1.0, divergence: jsd, beta: 0.5, temperature: 1.0}
synthesize: {output: responses.jsonl, sampling: {temperature: 0.0, max_new_tokens: 24},
             filter: {exact: true}}
train: {batch_size: 4, max_steps: 6, num_epochs: 10, warmup_steps: 0, learning_rate: 1e-3,
        precision: fp32}
evaluate: {prompts: []}
"""


@pytest.fixture(params=families.FAMILIES)
def family(request, tmp_path, monkeypatch):
    """``model/``、``text.jsonl``、``chat.jsonl``、``asked.jsonl``（只有问题）。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "cache"))
    families.build(request.param, Path("model"))
    rows = [{"text": f"{families.SENTENCES[n % 6]} {n}\n{families.SENTENCES[-n % 6]}"}
            for n in range(40)]  # fmt: skip
    asked = [{"id": f"q{n}", "messages": [{"role": "user", "content": question}], "answer": ANSWER}
             for n, question in enumerate(QUESTIONS)]  # fmt: skip
    reply = {"role": "assistant", "content": ANSWER}
    chat = [{**row, "messages": [*row["messages"], reply]} for row in asked]
    for name, content in (("text", rows), ("asked", asked), ("chat", chat)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for name, content in (
        ("text", TEXT),
        ("whole", WHOLE),
        ("chat", CHAT),
        ("on-policy", ON_POLICY),
    ):
        Path(f"{name}.yaml").write_text(content)
    return request.param


def summary(run):
    return json.loads(Path(f"runs/{run}/summary.json").read_text())


def plain(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def test_text_has_the_perplexity_of_transformers_with_its_own_bos(family, command):
    code, _, err = command("train", "text.yaml")
    assert code == 0, err
    model, tokenizer = plain("model")
    start = tokenizer("The capital")["input_ids"][0]
    adds = families.FAMILIES[family].adds_bos
    assert (start == tokenizer.bos_token_id) == adds
    _, validation = WikiDataset.build("text.jsonl", load_tokenizer("model"), max_seq_len=32)
    nats, tokens = 0.0, 0
    for chunk in validation:
        ids = chunk["input_ids"]
        assert ids[0] == start or not adds
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :, : len(tokenizer)]  # 填充行没有概率
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        counted = ids[1:] != start if adds else torch.ones_like(ids[1:], dtype=torch.bool)
        nats, tokens = nats + losses[counted].double().sum().item(), tokens + int(counted.sum())
    found = summary("text")["teacher"]["perplexity"]
    assert math.isclose(found, math.exp(nats / tokens), rel_tol=1e-4)


def test_a_student_of_all_its_layers_starts_as_the_teacher_and_exports_as_its_kind(family, command):
    code, _, err = command("train", "whole.yaml")
    if family == "lfm2":
        assert code == 2
        assert "model_type=lfm2, expected qwen2, llama, qwen3, mistral, gemma2 or gemma3" in err
        return
    assert code == 0, err
    found = summary("whole")
    assert found["student_before"]["kl"] < 1e-6
    teacher, before = found["teacher"]["perplexity"], found["student_before"]["perplexity"]
    assert math.isclose(teacher, before, rel_tol=1e-5)
    model, tokenizer = plain("runs/whole/export")
    assert model.config.model_type == families.FAMILIES[family].model_type
    ids = torch.tensor([tokenizer("The capital of France")["input_ids"]])
    assert ids[0].tolist() == plain("model")[1]("The capital of France")["input_ids"]
    student = load_generator("runs/whole").model
    with torch.no_grad():
        ours, theirs = student.logits(student(ids)), model(ids).logits
    torch.testing.assert_close(
        ours[..., : len(tokenizer)], theirs[..., : len(tokenizer)], atol=1e-4, rtol=0
    )


def test_chat_is_learnt_with_its_end_and_what_is_exported_stops_by_itself(family, command):
    if family == "qwen3":  # 不思考：空的 <think> 属于 prompt
        for recipe in (Path("chat.yaml"), Path("on-policy.yaml")):
            recipe.write_text(recipe.read_text().replace(
                "format: chat,", "format: chat, template_options: {enable_thinking: false},"
            ))  # fmt: skip
    code, _, err = command("train", "chat.yaml")
    assert code == 0, err
    assert summary("chat")["tasks"]["capitals"]["student_after"] == 1.0
    model, tokenizer = plain("runs/chat/export")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True, enable_thinking=False,
    )  # fmt: skip
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=200)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == ANSWER
    code, out, err = command("generate", "chat", "--chat", "--prompt", QUESTIONS[0])
    assert (code, out.split(None, 5)[-1].strip()) == (0, ANSWER), err

    code, out, err = command("synthesize", "on-policy.yaml")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
    assert [row["finish_reason"] for row in rows] == ["stop"] * len(QUESTIONS)
    code, _, err = command("train", "on-policy.yaml")
    assert code == 0, err
    train = [row for row in read_metrics(Path("runs/on-policy/metrics.jsonl"))
             if row["kind"] == "train"]  # fmt: skip
    assert any("rollout_responses" in row for row in train)
    assert all(math.isfinite(row["loss"]) for row in train)
    assert Path("runs/on-policy/export/model.safetensors").exists()


def test_greedy_is_that_of_transformers_for_prompts_of_any_length_together(family):
    prompts = ["The", "The capital of France is Paris, and", "知识蒸馏", "A b c d e f g h i j k l"]
    generator = load_generator("model")
    found = generator.generate(prompts, max_new_tokens=24)
    model, tokenizer = plain("model")
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, do_sample=False, max_new_tokens=24)[0].tolist()
        before, after = (tokenizer.decode(part, skip_special_tokens=True,
                                          clean_up_tokenization_spaces=False)
                         for part in (ids[0].tolist(), whole))  # fmt: skip
        assert before + text == after
