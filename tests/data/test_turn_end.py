"""一轮在哪里结束：模板写了标记的、由下一轮的角色标记结束的，与只用普通文字分隔的。"""

import copy

import families
import pytest
import torch

from distillab.batch import Example
from distillab.config.sections import SamplingConfig
from distillab.data.chat import render, render_prompt
from distillab.data.packing import collate_rows
from distillab.data.turn_end import turn_end
from distillab.generate.generator import TextGenerator
from distillab.generate.stops import stop_ids
from distillab.models.interface import PretrainedLM
from distillab.train.rollout import Rollout

TURNS = [
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "中国的首都呢？"},
    {"role": "assistant", "content": "北京。\n\n再见"},
]
OPEN = {  # 没有结束标记的几种写法
    "role marker": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "role marker on its own line": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "plain text": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "one turn only": "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    "Q: {{ messages[0].content }}\nA:{% if messages|length > 1 %} {{ messages[1].content }}"
    "{% endif %}",
}


def using(template, name="glm4"):
    tokenizer = families.tokenizer_of(name)
    tokenizer.chat_template = template
    return tokenizer


def rendered(turns, tokenizer, loss_on="all"):
    return render(turns, tokenizer, loss_on=loss_on)


def runs(tokens, tokenizer):
    """每一段连续的 response 的文字。"""
    texts = []
    for before, position in zip([-9, *tokens.response], tokens.response, strict=False):
        if position != before + 1:
            texts.append([])
        texts[-1].append(tokens.ids[position])
    return [tokenizer.decode(ids) for ids in texts]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("role marker", ["Paris.<|user|>", "北京。\n\n再见<|user|>"]),
        ("role marker on its own line", ["Paris.\n<|user|>", "北京。\n\n再见\n<|user|>"]),
        ("plain text", ["Paris.", "北京。\n\n再见<|endoftext|>"]),
    ],
)
def test_a_turn_left_open_is_closed_by_the_next_marker_or_eos(template, expected):
    tokenizer = using(OPEN[template])
    tokens = rendered(TURNS, tokenizer)
    assert runs(tokens, tokenizer) == expected
    assert runs(rendered(TURNS, tokenizer, "last"), tokenizer) == expected[-1:]
    assert tokens.labels[-1] in stop_ids(tokenizer)
    # 补上的只在结尾：各轮之前的 prompt 与推理时的逐个相同。
    assert tokens.prompt == render_prompt(TURNS, tokenizer)
    first = rendered(TURNS[:2], tokenizer)
    assert first.prompt == render_prompt(TURNS[:2], tokenizer)
    assert tokens.ids[: len(first.prompt)] == first.prompt


def test_a_template_of_one_turn_ends_with_eos():
    tokenizer = using(OPEN["one turn only"])
    assert runs(rendered(TURNS[:2], tokenizer), tokenizer) == [" Paris.<|endoftext|>"]


def test_what_is_written_after_the_turn_end_is_not_part_of_the_response():
    """Phi-3 在 ``<|end|>`` 之后、整段对话的结尾还写一个 eos；学生停在 ``<|end|>``，说不到它。"""
    tokenizer = families.tokenizer_of("phi3")
    found = runs(rendered(TURNS, tokenizer), tokenizer)
    assert [text.strip() for text in found] == ["Paris.<|end|>", "北京。\n\n再见<|end|>"]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gemma3", "mistral", "lfm2", "phi3"])
def test_nothing_is_added_where_the_template_ends_its_turns(name):
    tokenizer = families.tokenizer_of(name)
    assert turn_end(tokenizer).unwritten == ""
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert rendered(TURNS, tokenizer).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_blocks_that_mark_the_response_alone_are_closed_too():
    marked = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}" \
             "{% else %}{{ m.content }}{% endif %}"  # fmt: skip
    tokenizer = using(OPEN["role marker"].replace("{{ m.content }}", marked))
    assert runs(rendered(TURNS, tokenizer), tokenizer)[-1] == "北京。\n\n再见<|user|>"


def test_a_template_that_cannot_be_rendered_gives_no_stop():
    for template in (None, "{{ raise_exception('no') }}", "hello", "{% for %}"):
        tokenizer = using(template)
        assert turn_end(tokenizer) is None
        assert tokenizer.convert_ids_to_tokens(list(stop_ids(tokenizer))) == ["<|endoftext|>"]


def test_a_change_of_the_template_is_seen():
    tokenizer = using(OPEN["role marker"])
    assert turn_end(tokenizer).text == "<|user|>"
    tokenizer.chat_template = OPEN["plain text"]
    assert turn_end(tokenizer).text == "<|endoftext|>"
    tokenizer.eos_token = "<|observation|>"
    assert turn_end(tokenizer).text == "<|observation|>"


def test_the_marker_is_a_label_in_packed_rows_and_in_rollouts(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = families.tokenizer_of("glm4")
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    student = rendered(TURNS, tokenizer)
    teacher = rendered([{"role": "system", "content": "Be brief."}, *TURNS], tokenizer)
    assert student.labels == teacher.labels
    example = Example(student, teacher)
    batch = collate_rows([(example, example)], pad_id=tokenizer.pad_token_id)
    assert batch.labels.tolist() == student.labels * 2
    assert batch.labels.tolist().count(user) == 4

    directory = families.build("glm4", tmp_path / "glm4", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.fill_(1.0)
        model.lm_head.weight.zero_()[user] = 1.0  # 什么之后都是 <|user|>
    rollout = Rollout(
        TextGenerator(PretrainedLM(model), tokenizer), SamplingConfig(temperature=0.0)
    )
    [sampled], sums = rollout.sample([copy.copy(example)], [0])
    assert sampled.student.labels == sampled.teacher.labels == [user]
    assert (sums.truncated, sums.empty) == (0, 1)
