"""On-policy 的损失除以谁的 token 数：TRL 的 GKDTrainer 用数据集里的回答，这里用采样到的回答。

同样的学生、教师、prompt 与贪心采样，只改数据集里没人训练的回答有多长。
"""

import os
from functools import partial

import pytest
import torch
from datasets import Dataset

from distillab.batch import Example, collate_examples
from distillab.config.schema import LossConfig, TrainingConfig
from distillab.config.sections import ResponsesConfig, SamplingConfig
from distillab.data.chat import render
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.run_file_shapes import read_metrics
from distillab.teachers.in_process import LocalTeacher
from distillab.train.on_policy import OnPolicy
from distillab.train.rollout import Rollout
from distillab.train.trainer import DistillationTrainer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
gkd = pytest.importorskip("trl.experimental.gkd", reason="pip install 'distillab[bench]'")

NEW_TOKENS = 9
QUESTIONS = ["what is it?", "who is the teacher, and who is the student?", "why?", "the capital?"]


def conversations(reply):
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question in QUESTIONS
    ]


@pytest.fixture
def models(tiny_qwen2, tmp_path):
    """``make()`` 每次给出一对新的、逐位相同的学生与教师。"""
    tiny_qwen2.generation_config.eos_token_id = [397, 399]
    tiny_qwen2.save_pretrained(tmp_path / "student")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tiny_qwen2.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    tiny_qwen2.save_pretrained(tmp_path / "teacher")

    def make():
        load = partial(type(tiny_qwen2).from_pretrained, dtype=torch.float32)
        return load(tmp_path / "student"), load(tmp_path / "teacher")

    return make


@pytest.fixture
def trl_step(models, tiny_tokenizer, tmp_path, recwarn):
    """TRL 走一步：``(记下的损失, 梯度范数, 数据集里的回答有几个 token)``。"""

    def step(reply):
        student, teacher = models()
        trainer = gkd.GKDTrainer(
            student,
            teacher,
            gkd.GKDConfig(
                str(tmp_path / "trl"), lmbda=1.0, beta=0.5, temperature=1.0,
                max_new_tokens=NEW_TOKENS, max_length=64, per_device_train_batch_size=4,
                max_steps=1, logging_steps=1, save_strategy="no", report_to="none",
                use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"messages": conversations(reply)}),
            processing_class=tiny_tokenizer,
        )  # fmt: skip
        trainer.generation_config.do_sample = False
        labels = trainer.data_collator([{"messages": turns} for turns in conversations(reply)])
        trainer.train()
        row = trainer.state.log_history[0]
        return row["loss"], row["grad_norm"], int((labels["labels"] != -100).sum())

    return step


@pytest.fixture
def our_step(models, tiny_tokenizer, tmp_path):
    """我们走一步：``(记下的损失, 梯度范数, 采样到几个 token)``。"""

    def step(reply):
        student, teacher = map(PretrainedLM, models())
        views = [render(turns, tiny_tokenizer, loss_on="all") for turns in conversations(reply)]
        examples = [Example(view, view) for view in views]
        collate = partial(collate_examples, pad_id=397)
        generator = TextGenerator(student, tiny_tokenizer)
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)
        run_dir = tmp_path / f"ours-{len(reply)}"
        trainer = DistillationTrainer(
            student,
            LocalTeacher(teacher),
            examples,
            examples[:1],
            TrainingConfig(
                batch_size=4, max_steps=1, num_epochs=1, warmup_steps=0, log_interval=1,
                alpha=1.0, temperature=1.0,
            ),
            run_dir,
            loss=LossConfig(divergence="jsd", alpha=1.0, temperature=1.0),
            collate=collate,
            on_policy=OnPolicy(
                [Rollout(generator, sampling)], ResponsesConfig(student_fraction=1.0), collate, seed=0
            ),
        )  # fmt: skip
        trainer.train()
        row = next(row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train")
        return row["loss"], row["grad_norm"], row["tokens"]

    return step


def test_on_policy_loss_of_trl_follows_the_length_of_unused_replies_and_ours_does_not(
    trl_step, our_step
):
    short, long = "a", "a b c d e f g h i j k l"
    ours, ours_long = our_step(short), our_step(long)
    assert ours == ours_long
    loss, norm, tokens = ours
    theirs, theirs_long = trl_step(short), trl_step(long)
    unused, unused_long = theirs[2], theirs_long[2]
    assert unused_long > 4 * unused
    for found, count in ((theirs, unused), (theirs_long, unused_long)):
        # 分子相同：同样的回答上同样的 JSD，TRL 只是除以了数据集里的 token 数
        assert found[0] * count == pytest.approx(loss * tokens, rel=1e-4)
        assert found[1] * count == pytest.approx(norm * tokens, rel=1e-4)
    assert theirs[0] / theirs_long[0] == pytest.approx(unused_long / unused, rel=1e-4)
