"""词表有空洞、或与教师的不一样长，走真正的命令行。"""

import json
from pathlib import Path

import pytest
import torch
from placed import placed
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from distillab.run_file_shapes import read_metrics

RECIPE = (
    "description: tiny\n"
    "teacher: {{path: {teacher}}}\n"
    "student: {{init: {{from: teacher, layers: 2, choose: influence}}{student}}}\n"
    "data: {{source: chat.jsonl, format: chat, max_seq_len: 48}}\n"
    "train: {{batch_size: 4, max_steps: 30, warmup_steps: 2, learning_rate: 1e-2,\n"
    "        log_interval: 1, eval_interval: 30, save_interval: 30}}\n"
    "loss: {{alpha: {alpha}, temperature: 2.0}}\n"
    "responses: {{student_fraction: {fraction}}}\n"
    "sampling: {{max_new_tokens: 6}}\n"
)


@pytest.fixture
def chat(workdir, tiny_qwen2, tiny_tokenizer):
    """``gapped/`` 是同一个教师，只是 ``<|im_end|>`` 从 399 挪到 410，其间是没有用的行。"""
    rows = [
        {"messages": [{"role": "user", "content": f"item {i}"},
                      {"role": "assistant", "content": "the red one"[: 3 + i % 8]}]}
        for i in range(40)
    ]  # fmt: skip
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Qwen2Config(**tiny_qwen2.config.to_dict() | {"vocab_size": 416})
    wider = Qwen2ForCausalLM(config)
    state, weight = tiny_qwen2.state_dict(), 3 * torch.randn(416, 32)
    weight[:399], weight[410] = (
        state["model.embed_tokens.weight"][part] for part in (slice(399), 399)
    )
    named = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), weight)
    wider.load_state_dict(state | named)
    wider.save_pretrained("gapped")
    placed(tiny_tokenizer, im_end=410).save_pretrained("gapped")
    return workdir


def write(name, fraction=0.0, **changes):
    parts = {
        "teacher": "teacher",
        "student": "",
        "fraction": fraction,
        "alpha": 1.0 if fraction else 0.5,
    } | changes
    Path(f"{name}.yaml").write_text(RECIPE.format(**parts))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_gap_changes_no_figure_and_the_student_learns_to_stop(chat, command, fraction):
    found = {}
    for name in ("teacher", "gapped"):
        write(name, fraction, teacher=name)
        code, _, err = command("train", f"{name}.yaml")
        assert code == 0, err
        assert "not trained" not in err
        found[name] = read_metrics(Path(f"runs/{name}/metrics.jsonl"))
    for left, right in zip(found["teacher"], found["gapped"], strict=True):
        for key in left.keys() & {"tokens", "loss", "cross_entropy", "perplexity"}:
            assert right.get(key) == pytest.approx(left.get(key), rel=1e-3), key
    if fraction:
        return
    model = AutoModelForCausalLM.from_pretrained("runs/gapped/export").eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/gapped/export")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 410
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "item 3"}], add_generation_prompt=True, return_dict=False
    )
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, eos_token_id=410, do_sample=False
    )[0, len(prompt) :].tolist()
    assert 410 in written
    assert not set(written) & {399, *range(400, 410), *range(411, 416)}


def test_a_turn_end_under_another_id_is_refused_in_one_line(chat, command, tiny_tokenizer):
    tiny_tokenizer.save_pretrained("wide")
    AutoModelForCausalLM.from_pretrained("gapped").save_pretrained("wide")
    write("moved", student=", tokenizer: gapped", teacher="wide")
    code, _, err = command("train", "moved.yaml")
    assert code == 2
    assert "'<|im_end|>' (id 410)" in err
    assert "could not learn to stop" in " ".join(err.split())


def test_tokens_that_only_the_student_has_are_counted(chat, command, tiny_tokenizer):
    placed(tiny_tokenizer, think=403).save_pretrained("longer")
    text = Path("chat.jsonl").read_text().replace('"the r', '"<|think|>the r')
    Path("chat.jsonl").write_text(text)
    write("counted", student=", tokenizer: longer", teacher="wide")
    wider = AutoModelForCausalLM.from_pretrained("teacher")
    wider.resize_token_embeddings(408)
    wider.save_pretrained("wide")
    tiny_tokenizer.save_pretrained("wide")
    code, _, err = command("train", "counted.yaml")
    assert code == 0, err
    said = " ".join(err.split())
    assert "share 400 token ids; without probability and not trained on: 1 of the student's" in said
    assert "response tokens are not trained on: only the student's tokenizer has" in said
    write("narrow", student=", tokenizer: longer", teacher="teacher")
    code, _, err = command("train", "narrow.yaml")
    assert code == 2
