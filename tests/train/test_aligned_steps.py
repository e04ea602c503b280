"""分词器不同时的一步：怎样分批、padding、放不放在一行里，总和与梯度都相同。"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distillab.batch import Example, Tokens
from distillab.config.model_sections import ModelConfig
from distillab.config.schema import LossConfig
from distillab.data.aligned_batches import AlignedCollate
from distillab.data.sides import Side, Sides, response_segments
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.models.tokenizer import own_vocabulary
from distillab.teachers.in_process import LocalTeacher
from distillab.train.module import DistillationModule
from distillab.train.two_tokenizers import Across, byte_counts

TEXTS = ["the teacher gives soft targets", "1987", "中国的模型 learns them", "a"]


@pytest.fixture
def sides(tiny_tokenizer):
    """学生的分词器只有 256 个字节与一个特殊 token，没有合并。"""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    student = type(tiny_tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>")
    return Sides(Side(student, "student"), Side(tiny_tokenizer, "teacher"))


@pytest.fixture
def examples(sides):
    found = []
    for number, text in enumerate(TEXTS):
        views = []
        for side, prompt in zip(sides, ([1, 2], [3] * (number + 1)), strict=True):
            ids = [*prompt, *side.encoder.plain([text])[0], side.end]
            views.append(Tokens(ids, list(range(len(prompt), len(ids)))))
        found.append(Example(*views, response_segments(*views)))
    return found


@pytest.mark.parametrize("divergence", ["alm", "projected_kl", "uld", "gold"])
def test_batches_and_packing_change_nothing_but_roundings(sides, examples, tiny_qwen2, divergence):
    torch.manual_seed(0)
    student = StudentModel(
        ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                    intermediate_size=48, vocab_size=257, max_seq_len=128)
    )  # fmt: skip
    teacher = LocalTeacher(PretrainedLM(tiny_qwen2))
    vocabularies = [own_vocabulary(side.tokenizer) for side in sides]
    across = Across(*(byte_counts(side.bytes) for side in sides), vocabularies[1], sides.projected)
    module = DistillationModule(
        student, LossConfig(divergence=divergence, alpha=0.5), vocabularies[0], True, across
    )
    collate = AlignedCollate(sides, (0, 0), 64)

    def step(windows):
        module.zero_grad()
        total, tokens, sizes = torch.zeros(6), 0, torch.zeros(2, dtype=torch.float64)
        for window in windows:
            batch = collate(window)
            part = module(batch, teacher.targets(batch.teacher, vocabularies[1]))
            part.total.backward()
            total += torch.stack(part).detach()
            tokens, sizes = tokens + len(batch), sizes + across.bytes_of(batch)
        return total, tokens, sizes, torch.cat([p.grad.flatten() for p in student.parameters()])

    whole = step([examples])
    assert whole[1] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert whole[2].tolist() == [sum(len(text.encode()) for text in TEXTS)] * 2
    for windows in ([[one] for one in examples], [[tuple(examples)]]):
        found = step(windows)
        torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=1e-5)
        assert found[1] == whole[1]
        torch.testing.assert_close(found[3], whole[3], rtol=1e-4, atol=1e-5)


def test_of_different_texts_only_the_ends_are_aligned(sides, examples):
    mixed = Example(examples[1].student, examples[3].teacher,
                    response_segments(examples[1].student, examples[3].teacher))  # fmt: skip
    batch = AlignedCollate(sides, (0, 0), 64)([mixed])
    assert len(batch.alignment) == 1
    assert (batch.alignment.student_chunk < 1).sum() == 1
