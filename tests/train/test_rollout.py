"""从学生采样的 response：不留痕迹，按采样之后的 token 数训练，有指标盯着。"""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from distillab.batch import Example, Tokens, collate_examples
from distillab.config.model_sections import ModelConfig
from distillab.config.schema import EvaluateConfig, LossConfig, TrainingConfig
from distillab.config.sections import ResponsesConfig, SamplingConfig
from distillab.errors import DistillabError
from distillab.generate.generator import TextGenerator
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.run_file_shapes import read_metrics
from distillab.teachers.in_process import LocalTeacher
from distillab.train.on_policy import OnPolicy, RolloutGuard
from distillab.train.rollout import Rollout, RolloutSums, repetition, student_fraction
from distillab.train.trainer import DistillationTrainer

LENGTH = 64


def example(length, prompt=5, experience=4, seed=0):
    """学生读 prompt，教师先读经验；response 相同。"""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(10, 390, (count,), generator=generator).tolist()  # noqa: E731
    question, extra, response = draw(prompt), draw(experience), draw(length)
    student = Tokens(question + response, list(range(prompt, prompt + length)))
    start = prompt + experience
    return Example(student, Tokens(extra + question + response, list(range(start, start + length))))


@pytest.fixture
def student():
    torch.manual_seed(0)
    return StudentModel(
        ModelConfig(
            hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
            vocab_size=400, max_seq_len=LENGTH, dropout=0.1,
        )
    )  # fmt: skip


@pytest.fixture
def rollout(student, tiny_tokenizer):
    sampling = SamplingConfig(temperature=0.9, max_new_tokens=12)
    return Rollout(TextGenerator(student, tiny_tokenizer), sampling, LENGTH)


@pytest.fixture
def make(student, rollout, tiny_qwen2, tmp_path):
    def build(lengths, *, name="run", fraction=1.0, reuse=1, **config):
        examples = [example(length, seed=i) for i, length in enumerate(lengths)]
        collate = partial(collate_examples, pad_id=397)
        return DistillationTrainer(
            student,
            LocalTeacher(PretrainedLM(tiny_qwen2)),
            examples,
            examples[:2],
            TrainingConfig(
                **{
                    "batch_size": 2,
                    "learning_rate": 1e-3,
                    "warmup_steps": 0,
                    "num_epochs": 1,
                    "log_interval": 1,
                    "scheduler": "constant",
                    "temperature": 1.0,
                    "alpha": 1.0,
                }
                | config
            ),
            tmp_path / name,
            loss=LossConfig(divergence="jsd", alpha=1.0, temperature=1.0),
            evaluate=EvaluateConfig(batch_size=2),
            collate=collate,
            on_policy=OnPolicy(
                [rollout], ResponsesConfig(student_fraction=fraction, reuse=reuse), collate, seed=0
            ),
        )

    return build


def training_rows(trainer):
    return [r for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["kind"] == "train"]


def test_sampled_response_replaces_the_old_one_in_both_views(rollout):
    old = [example(3, prompt=4, seed=1), example(9, prompt=8, seed=2)]
    new, sums = rollout.sample(old, seeds=[3, 4])
    for before, after in zip(old, new, strict=True):
        assert after.student.prompt == before.student.prompt
        assert after.teacher.prompt == before.teacher.prompt
        assert after.student.labels == after.teacher.labels
        assert after.student.ids == before.student.prompt + after.student.labels
        assert 1 <= len(after.student.labels) <= 12
    assert sums.responses == 2
    assert sums.tokens == sum(len(x.student.labels) for x in new)


def test_same_seed_gives_the_same_responses_and_padding_does_not_show(rollout):
    rollout = Rollout(rollout.generator, SamplingConfig(temperature=0, max_new_tokens=12), LENGTH)
    short, long = example(3, prompt=4, seed=1), example(3, prompt=20, seed=2)
    together, _ = rollout.sample([short, long], seeds=[1, 2])
    alone, _ = rollout.sample([short], seeds=[2])
    assert together[0].student.ids == alone[0].student.ids


def test_sampling_leaves_modes_gradients_and_random_state_alone(rollout, student):
    student.train()
    next(iter(student.children())).eval()  # 有的子模块本来就在 eval
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    new, _ = rollout.sample([example(3)], seeds=[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())
    again, _ = rollout.sample([example(3)], seeds=[1])
    assert new[0].student.ids == again[0].student.ids  # dropout 关着


def test_response_keeps_its_stop_token_and_nothing_after_it(rollout, monkeypatch):
    stop = min(rollout.generator.stop_ids)
    rows = torch.tensor([[20, stop, 397, 397], [30, 31, 32, 33], [stop, 397, 397, 397]])
    monkeypatch.setattr(rollout.generator, "generate_ids", lambda *_, **__: rows)
    new, sums = rollout.sample([example(2, seed=i) for i in range(3)], seeds=[0, 1, 2])
    assert [x.student.labels for x in new] == [[20, stop], [30, 31, 32, 33], [stop]]
    assert (sums.truncated, sums.empty) == (1, 1)


@pytest.mark.parametrize(("prompt", "experience"), [(58, 0), (50, 8), (6, 52)])
def test_a_row_short_of_room_shortens_no_other_response(rollout, prompt, experience):
    """余地不足的是学生的上下文、教师的上下文，或两者。"""
    rollout = Rollout(rollout.generator, SamplingConfig(temperature=0, max_new_tokens=12), LENGTH)
    roomy, tight = example(3, seed=1), example(3, prompt=prompt, experience=experience, seed=2)
    apart = [rollout.sample([one], seeds=[0])[0][0] for one in (tight, roomy, tight)]
    together, sums = rollout.sample([tight, roomy, tight], seeds=[0, 0, 0])
    assert together == apart
    assert [len(one.student.response) for one in together] == [6, 12, 6]
    assert (sums.responses, sums.tokens, sums.truncated) == (3, 24, 3)


def test_a_teacher_prompt_that_leaves_no_room_is_refused(rollout):
    with pytest.raises(DistillabError, match=r"teacher prompt has 70 tokens.*64"):
        rollout.sample([example(2, prompt=5, experience=65)], seeds=[0])


def test_tokens_are_those_of_the_sampled_responses_whatever_the_data_says(make):
    short = make([2] * 8, name="short", gradient_accumulation_steps=2, max_steps=2)
    weights = {name: x.clone() for name, x in short.student.state_dict().items()}
    short.train()
    long = make([30] * 8, name="long", gradient_accumulation_steps=2, max_steps=2)
    long.student.load_state_dict(weights)
    long.train()
    for left, right in zip(training_rows(short), training_rows(long), strict=True):
        assert left["tokens"] == right["tokens"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
        assert left["tokens"] != 2 * 4


def test_rollout_metrics_are_recorded_only_when_something_was_sampled(make):
    sampled = make([3] * 8, name="sampled", max_steps=1)
    sampled.train()
    (row,) = training_rows(sampled)
    assert row["rollout_responses"] == 2
    assert 0 < row["rollout_length"] <= 12
    assert row["rollout_student_entropy"] == pytest.approx(5.99, abs=0.5)  # 近似均匀：log 400
    assert row["rollout_teacher_logprob"] < 0
    off_policy = make([3] * 8, name="off", fraction=0.0, max_steps=1)
    off_policy.train()
    (row,) = training_rows(off_policy)
    assert not [key for key in row if key.startswith("rollout")]
    assert row["tokens"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_has_the_precision_of_training(make, monkeypatch, precision):
    trainer = make([4] * 4, precision=precision)
    prepare, products = OnPolicy.prepare, set()

    def watched(*arguments):
        hook = trainer.student.blocks[0].attention.q_proj.register_forward_hook(
            lambda *call: products.add(call[-1].dtype)
        )
        try:
            return prepare(*arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(OnPolicy, "prepare", watched)
    trainer.train()
    assert products == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_reuse_trains_several_steps_on_one_rollout(make, monkeypatch):
    trainer = make([3] * 8, reuse=2)
    calls = []
    original = trainer.on_policy.rollouts[0].sample
    monkeypatch.setattr(
        trainer.on_policy.rollouts[0], "sample", lambda *a: calls.append(1) or original(*a)
    )
    trainer.train()
    assert trainer.state.current_step == trainer.total_steps == 8
    assert len(calls) == 4


def test_fraction_follows_its_schedule():
    constant = ResponsesConfig(student_fraction=0.5)
    assert [student_fraction(constant, step, 5) for step in (0, 4)] == [0.5, 0.5]
    linear = ResponsesConfig(student_fraction=0.0, final_student_fraction=1.0)
    assert [student_fraction(linear, step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


class Unsampled:
    """不采样的 Rollout：只看哪些步会采样。"""

    generator = SimpleNamespace(model=None)

    def of(self, model):
        return self

    def groups(self, examples):
        return [list(range(len(examples)))]

    def sample(self, examples, seeds):
        return list(examples), RolloutSums()


def test_about_the_fraction_of_steps_is_sampled_and_a_resumed_run_repeats_it(rollout):
    collate = partial(collate_examples, pad_id=397)
    policy = OnPolicy([rollout], ResponsesConfig(student_fraction=0.3), collate, seed=5)
    policy.rollouts = [Unsampled()]
    batch = collate([example(3)])
    flags = [policy.prepare([batch] * 4, step, 400, rank=0).sampled for step in range(400)]
    assert 0.25 < sum(flags) / 400 < 0.35
    assert policy.prepare([batch], 50, 400, rank=1, processes=2).sampled == flags[50]


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition(list(range(20))) == 0
    assert repetition([7] * 100) == pytest.approx(0.99, abs=0.01)
    assert repetition([1, 2]) == 0


def test_guard_says_once_what_is_wrong_and_again_after_it_was_right(caplog):
    guard = RolloutGuard()
    sums = {
        "responses": 10, "tokens": 100, "truncated": 9, "empty": 0, "repetition": 8.0,
        "scored": 100, "student_nll": 100.0, "teacher_nll": 200.0,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="distillab"):
        assert guard.row(sums, 1)["rollout_truncated"] == 0.9
        guard.row(sums, 2)
        assert caplog.text.count("90% of the sampled responses end at") == 1
        assert caplog.text.count("80% of the 4-grams") == 1
        guard.row(sums | {"truncated": 0, "repetition": 0.0}, 3)
        guard.row(sums | {"tokens": 500, "student_nll": 1.0}, 4)
    assert caplog.text.count("90% of the sampled responses end at") == 2
    assert "5.0 times as long as at the start" in caplog.text
    assert "sampling explores nothing" in caplog.text
    assert guard.row({}, 5) == {}


def test_a_resumed_run_compares_with_the_start_and_repeats_no_warning(make, monkeypatch, caplog):
    def train(length, max_steps):
        trainer = make([3] * 8, max_steps=max_steps)
        rows = torch.randint(10, 390, (2, length), generator=torch.Generator().manual_seed(0))
        generator = trainer.on_policy.rollouts[0].generator
        monkeypatch.setattr(generator, "generate_ids", lambda *_, **__: rows)
        caplog.clear()
        trainer.train(resume=True)
        return caplog.text

    assert "100% of the sampled responses end at" in train(4, max_steps=2)
    log = train(12, max_steps=4)
    assert "3.0 times as long as at the start (12 tokens)" in log
    assert "of the sampled responses end at" not in log


def test_responses_return_to_their_examples_however_they_are_grouped(rollout, monkeypatch):
    collate = partial(collate_examples, pad_id=397)
    policy = OnPolicy([rollout], ResponsesConfig(student_fraction=1.0), collate, seed=5)
    window = [collate([example(3, seed=i), example(2, seed=i + 9)]) for i in range(3)]
    expected = policy.prepare(window, 0, 4)
    monkeypatch.setattr(type(rollout), "groups", lambda *_: [[5, 0], [3], [1, 4, 2]])
    found = policy.prepare(window, 0, 4)
    assert found.sums == expected.sums
    for one, other in zip(found.batches, expected.batches, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.student.input_ids, other.student.input_ids)
