"""训练循环的不变量：怎样切分都是同一步，被打断也接得上，坏的一步不留痕迹。"""

import copy
import json
import logging
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

from distillab.config.model_sections import ModelConfig
from distillab.config.schema import EvaluateConfig, LossConfig, TrainingConfig
from distillab.distributed.engine import (
    learning_rate_factor,
    make_accelerator,
    make_optimizer,
    resolve_precision,
)
from distillab.errors import DistillabError, Terminated
from distillab.export.convert import from_hf
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel
from distillab.run_file_shapes import read_metrics
from distillab.teachers.in_process import LocalTeacher
from distillab.train.checkpoint import load_student
from distillab.train.checkpoint_files import checkpoints, read_saved
from distillab.train.loaders import windows
from distillab.train.trainer import DistillationTrainer
from distillab.vocabulary import Vocabulary


class Chunks(Dataset):
    """有规律可学的 token 块：每个 token 是前一个的函数，另有少许噪声。"""

    def __init__(self, count: int = 40, length: int = 12, vocab: int = 400, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(vocab, (count, 1), generator=generator)
        self.ids = (start + 7 * torch.arange(length)) % vocab

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i]
        return {"input_ids": ids, "labels": torch.cat([ids[1:], torch.tensor([-100])])}


SMALL = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 48, "vocab_size": 400, "max_seq_len": 64,
}  # fmt: skip
FAST = {"batch_size": 4, "max_steps": 6, "warmup_steps": 1, "learning_rate": 3e-3,
        "log_interval": 1, "eval_interval": 1000, "save_interval": 1000}  # fmt: skip


@pytest.fixture
def teacher(tiny_qwen2):
    return LocalTeacher(PretrainedLM(tiny_qwen2))


@pytest.fixture
def make(tmp_path, teacher):
    """造一个训练循环；学生的初始权重总是相同。"""

    def make(name="run", *, student=None, dropout=0.0, use_teacher=True, data=None, loss=None,
             vocabulary=None, **config):  # fmt: skip
        torch.manual_seed(0)
        return DistillationTrainer(
            student or StudentModel(ModelConfig(**SMALL, dropout=dropout)),
            teacher if use_teacher else None,
            data or Chunks(),
            Chunks(6, seed=1),
            TrainingConfig(**FAST | config),
            tmp_path / name,
            loss=loss,
            evaluate=EvaluateConfig(batch_size=4),
            vocabulary=vocabulary,
        )

    return make


def losses(trainer):
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [(row["step"], row.get("loss")) for row in rows if row["kind"] == "train"]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.student.parameters()])


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(make, teacher):
    before = [p.clone() for p in teacher.model.parameters()]
    trainer = make(max_steps=30)
    state = trainer.train()
    first, last = losses(trainer)[0][1], losses(trainer)[-1][1]
    assert last < first - 0.2
    assert state.tokens == 30 * 4 * 11  # 每块最后一个位置没有目标
    for parameter, old in zip(teacher.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_whoever_watches_the_metrics_is_called_after_each_row(make):
    trainer, seen = make(max_steps=4, eval_interval=2), []
    trainer.train(on_metrics=lambda path: seen.append(len(read_metrics(path))))
    assert seen == [1, 2, 3, 4, 5, 6]  # 四步，两次验证；调用时那一行已能读到


@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_one_step_is_the_same_however_it_is_split_into_micro_batches(make, size, accumulation):
    whole = make("whole", batch_size=8, max_steps=4)
    whole.train()
    split = make("split", batch_size=size, gradient_accumulation_steps=accumulation, max_steps=4)
    split.train()
    for (step, expected), (other, found) in zip(losses(whole), losses(split), strict=True):
        assert step == other
        assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(
        weights(split), weights(whole), rtol=1e-4, atol=1e-5
    )  # Adam 放大极小梯度的舍入


def test_sequences_with_fewer_targets_weigh_by_their_tokens(make):
    class Ragged(Chunks):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            item["labels"][: i % 10] = -100
            return item

    whole = make("whole", data=Ragged(), batch_size=8, max_steps=3)
    whole.train()
    split = make("split", data=Ragged(), batch_size=1, gradient_accumulation_steps=8, max_steps=3)
    split.train()
    assert whole.state.tokens == split.state.tokens
    torch.testing.assert_close(
        weights(split), weights(whole), rtol=1e-4, atol=1e-5
    )  # Adam 放大极小梯度的舍入


def test_micro_batch_without_any_target_is_no_obstacle(make):
    class Empty(Chunks):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return item if i % 2 else item | {"labels": torch.full_like(item["labels"], -100)}

    trainer = make(data=Empty(), batch_size=1, gradient_accumulation_steps=2)
    state = trainer.train()
    assert state.skipped_steps == 0
    assert all(math.isfinite(loss) for _, loss in losses(trainer) if loss is not None)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_first_loss_is_the_documented_formula(make, alpha, teacher):
    trainer = make(batch_size=40, max_steps=1, warmup_steps=0, alpha=alpha, temperature=2.0)
    torch.manual_seed(0)
    student = StudentModel(ModelConfig(**SMALL))
    ids = Chunks().ids
    q = student.logits(student(ids))[:, :-1].flatten(0, 1)
    p = teacher.model.logits(teacher.model(ids))[:, :-1].flatten(0, 1)
    kl = F.kl_div((q / 2).log_softmax(-1), (p / 2).softmax(-1), reduction="batchmean")
    expected = alpha * 4 * kl + (1 - alpha) * F.cross_entropy(q, ids[:, 1:].flatten())
    trainer.train()
    assert losses(trainer)[0][1] == pytest.approx(expected.item(), rel=1e-5)


def test_alpha_zero_never_asks_the_teacher_while_training(make, teacher, monkeypatch):
    trainer = make(alpha=0.0)
    monkeypatch.setattr(trainer, "evaluate", lambda progress=None: ({"cross_entropy": 1.0,
        "perplexity": 1.0, "kl": None, "top1_agreement": None}, None))  # fmt: skip
    monkeypatch.setattr(teacher, "targets", lambda *_: pytest.fail("the teacher was asked"))
    trainer.train()


def test_a_run_without_a_teacher_validates_without_kl(make):
    trainer = make(use_teacher=False, alpha=0.0)
    trainer.train()
    student, teacher = trainer.evaluate()
    assert teacher is None
    assert student["kl"] is None


def test_alpha_above_zero_without_a_teacher_is_refused(make):
    with pytest.raises(DistillabError, match=r"loss\.alpha=0\.5 needs a teacher"):
        make(use_teacher=False)


def test_validation_equals_a_plain_computation(make, teacher):
    trainer = make()
    student, reference = trainer.evaluate()
    ids = Chunks(6, seed=1).ids
    q = trainer.student.logits(trainer.student(ids))[:, :-1].flatten(0, 1)
    p = teacher.model.logits(teacher.model(ids))[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    assert student["cross_entropy"] == pytest.approx(F.cross_entropy(q, labels).item(), rel=1e-5)
    assert student["perplexity"] == pytest.approx(math.exp(student["cross_entropy"]))
    kl = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean").item()
    assert student["kl"] == pytest.approx(kl, rel=1e-5)
    agreement = (q.argmax(-1) == p.argmax(-1)).double().mean().item()
    assert student["top1_agreement"] == pytest.approx(agreement)
    assert reference["cross_entropy"] == pytest.approx(F.cross_entropy(p, labels).item(), rel=1e-5)
    assert (reference["kl"], reference["top1_agreement"]) == (0, 1)


def test_validation_uses_sequences_spread_over_the_whole_set(make):
    trainer = make()
    trainer.evaluate_config = EvaluateConfig(max_sequences=3)
    loader = trainer.evaluation_loader(Chunks(9, seed=1))
    used = [row for batch in loader for row in batch.student.input_ids.tolist()]
    assert used == Chunks(9, seed=1).ids[[0, 3, 6]].tolist()


def test_padding_rows_of_the_vocabulary_are_never_trained(make):
    trainer = make(vocabulary=Vocabulary(390), weight_decay=0.0)
    before = trainer.student.embedding.weight[390:].clone()
    used = set(Chunks().ids.flatten().tolist()) & set(range(390, 400))
    trainer.train()
    untouched = [i - 390 for i in range(390, 400) if i not in used]
    after = trainer.student.embedding.weight[390:]
    assert torch.equal(after[untouched], before[untouched])
    assert len(untouched) < 10  # 输入里出现过的那些经由 embedding 训练，没有目标


def test_student_from_transformers_takes_the_same_path(make, tiny_qwen2):
    theirs = PretrainedLM(copy.deepcopy(tiny_qwen2).requires_grad_())
    wrapped = make("wrapped", student=theirs, temperature=0.5)
    native = make("native", student=from_hf(tiny_qwen2), temperature=0.5)
    wrapped.train()
    native.train()
    for (_, left), (_, right) in zip(losses(wrapped), losses(native), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_activation_checkpointing_changes_no_number(make):
    plain, recomputed = make("plain"), make("recomputed", activation_checkpointing=True)
    plain.train()
    recomputed.train()
    assert losses(plain) == losses(recomputed)


def test_bf16_follows_float32(make):
    full = make("full")
    full.train()
    with pytest.raises(DistillabError, match="already trained with another precision"):
        make("half", precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    half = make("half", precision="bf16")
    half.train()
    for (_, left), (_, right) in zip(losses(full), losses(half), strict=True):
        assert left == pytest.approx(right, rel=0.02)
        assert left != right


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [(True, "bf16"), (False, "fp32")], ids=["units", "no units"]
)
def test_auto_precision_is_bf16_only_where_the_cpu_multiplies_it(bfloat16, expected, monkeypatch):
    monkeypatch.setattr("distillab.distributed.engine.has_bfloat16_units", lambda: bfloat16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_precision("auto") == expected
    assert resolve_precision("bf16") == "bf16"


def test_auto_precision_is_fp16_on_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16")):
        monkeypatch.setattr(
            "torch.cuda.get_device_capability", lambda capability=capability: capability
        )
        assert resolve_precision("auto") == expected


@pytest.mark.parametrize("cuda", [True, False])
def test_batches_travel_to_a_gpu_while_it_computes(cuda, monkeypatch, tmp_path):
    given = {}

    def engine(**options):
        given.update(options)
        return SimpleNamespace(distributed_type="NO")

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("distillab.distributed.engine.Accelerator", engine)
    make_accelerator(TrainingConfig(), tmp_path)
    assert given["dataloader_config"].non_blocking is cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_without_a_gpu_is_refused_before_anything_is_built(make):
    with pytest.raises(DistillabError, match="fp16 needs a GPU; on this machine use bf16"):
        make(precision="fp16")


def test_too_little_data_is_refused(make):
    with pytest.raises(DistillabError, match=r"3 sequences, fewer than one batch .*=4"):
        make(data=Chunks(3))


# ---------------------------------------------------------------- 恢复


class Killed(BaseException):
    """进程在这里没了。"""


def die_after(trainer, step):
    """第 ``step`` 步走完、存好之后，再走一步就死。"""
    run = trainer._step

    def run_or_die(window):
        if trainer.state.current_step > step:
            raise Killed
        return run(window)

    trainer._step = run_or_die


@pytest.mark.parametrize("stop", [3, 7, 10])  # 一轮有 10 步：轮内、轮末、恰在边界
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(make, stop):
    options = {"max_steps": 14, "dropout": 0.2, "eval_interval": 2}
    whole = make("whole", **options)
    whole.train()

    first = make("parts", **options, save_interval=stop)
    die_after(first, stop)
    with pytest.raises(Killed):
        first.train()
    second = make("parts", **options)
    state = second.train(resume=True)
    assert state.current_step == 14
    assert losses(second) == losses(whole)
    assert torch.equal(weights(second), weights(whole))
    assert state.best_val_loss == whole.state.best_val_loss
    validations = [
        [row for row in read_metrics(t.run_dir / "metrics.jsonl") if row["kind"] == "validation"]
        for t in (second, whole)
    ]
    assert validations[0] == validations[1]


def test_a_run_may_be_resumed_in_other_micro_batches_but_not_in_other_steps(make, caplog):
    caplog.set_level(logging.INFO, "distillab")
    whole = make("whole", max_steps=8, batch_size=4)
    whole.train()
    first = make("moved", max_steps=8, batch_size=4, save_interval=3)
    die_after(first, 3)
    with pytest.raises(Killed):
        first.train()
    with pytest.raises(DistillabError, match=r"had 4 sequences and now has 2 .* to make 4"):
        make("moved", max_steps=8, batch_size=2).train(resume=True)
    second = make("moved", max_steps=8, batch_size=1, gradient_accumulation_steps=4)
    with caplog.at_level("INFO", "distillab"):
        second.train(resume=True)
    assert dict(losses(second)) == pytest.approx(dict(losses(whole)), rel=1e-5)
    assert "the data continues after sequence 12 of the epoch" in caplog.text


def test_rows_written_after_the_checkpoint_are_dropped_on_resume(make):
    whole = make("whole", max_steps=8)
    whole.train()
    first = make("cut", max_steps=8, save_interval=3)
    first.train()
    shutil.rmtree(checkpoints(first.checkpoint_dir)[-1])  # 第 8 步的没写成，最新的是第 6 步
    with (first.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "lo')  # 被杀时写到一半
    second = make("cut", max_steps=8, save_interval=3)
    second.train(resume=True)
    assert losses(second) == losses(whole)


def test_averages_over_a_log_interval_survive_a_resume_inside_it(make):
    whole = make("whole", max_steps=8, log_interval=4)
    whole.train()
    first = make("parts", max_steps=8, log_interval=4, save_interval=6)
    first.train()
    shutil.rmtree(checkpoints(first.checkpoint_dir)[-1])
    second = make("parts", max_steps=8, log_interval=4)
    second.train(resume=True)
    assert losses(second) == losses(whole)


def test_newest_checkpoints_and_the_best_are_kept(make):
    trainer = make(max_steps=9, save_interval=2, max_checkpoints=2, eval_interval=3)
    trainer.train()
    kept = sorted(path.name for path in trainer.checkpoint_dir.iterdir())
    assert kept == ["best", "step-00000008", "step-00000009"]


def test_best_checkpoint_holds_the_weights_of_the_best_validation(make):
    trainer = make(max_steps=12, eval_interval=1, learning_rate=0.3)  # 学习率过大，时好时坏
    trainer.train()
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    values = {r["step"]: r["cross_entropy"] for r in rows if r["kind"] == "validation"}
    best = min(values, key=values.get)
    state = load_student(trainer.student, trainer.checkpoint_dir / "best")
    assert state.best_step == best
    assert trainer.evaluate()[0]["cross_entropy"] == pytest.approx(values[best], rel=1e-6)


def test_other_data_than_the_run_began_with_is_refused_on_resume(make):
    def chunks(fingerprint, count=40):
        data = Chunks(count)
        data.fingerprint = fingerprint
        return data

    make(data=chunks("a"), save_interval=3).train()
    with pytest.raises(DistillabError, match="step-00000006: the training data differs"):
        make(data=chunks("b"), max_steps=8).train(resume=True)
    assert make(data=chunks("a"), max_steps=8).train(resume=True).current_step == 8


def test_unfinished_checkpoint_is_not_resumed_from(make):
    trainer = make(save_interval=3)
    trainer.train()
    newest = checkpoints(trainer.checkpoint_dir)[-1]
    newest.rename(newest.with_name(f".{newest.name}.0123456789ab.tmp"))  # 像是写到一半被杀
    again = make(save_interval=3)
    again.train(resume=True)
    assert again.state.current_step == 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: os.truncate(p / "model.safetensors", 100), "damaged checkpoint"),
        (lambda p: os.truncate(p / "optimizer.bin", 100), "damaged checkpoint"),
        (lambda p: (p / "scheduler.bin").write_bytes(b"no"), "damaged checkpoint"),
        (
            lambda p: (p / "trainer_state.json").write_text("{"),
            "trainer_state.json is not readable",
        ),
        (lambda p: (p / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda p: (p / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
        (lambda p: os.truncate(p / "random_states_0.pkl", 10), "damaged checkpoint"),
    ],
)
def test_damaged_checkpoint_is_named_in_one_line(make, damage, message):
    trainer = make()
    trainer.train()
    newest = checkpoints(trainer.checkpoint_dir)[-1]
    damage(newest)
    with pytest.raises(DistillabError, match=message) as caught:
        make().train(resume=True)
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_resumed(make, caplog):
    caplog.set_level(logging.INFO, "distillab")
    whole = make("whole", max_steps=9)
    whole.train()
    first = make("parts", max_steps=9, save_interval=3)
    die_after(first, 6)
    with pytest.raises(Killed):
        first.train()
    newest = checkpoints(first.checkpoint_dir)[-1]
    os.truncate(newest / "model.safetensors", 100)
    caplog.set_level(logging.INFO, "distillab")
    again = make("parts", max_steps=9, save_interval=100)
    again.train(resume=True)
    assert losses(again) == losses(whole)
    aside = newest.with_name("damaged-step-00000006")
    assert f"{newest}: damaged checkpoint" in caplog.text
    assert f"moved to {aside}" in caplog.text
    assert f"resumed from {newest.with_name('step-00000003')} at step 3" in caplog.text
    assert aside.is_dir()


def test_checkpoint_of_another_model_is_no_reason_to_take_an_older_one(make):
    trainer = make(save_interval=3)
    trainer.train()
    other = StudentModel(ModelConfig(**SMALL | {"intermediate_size": 64}))
    with pytest.raises(DistillabError, match="step-00000006: holds another model"):
        make(student=other).train(resume=True)
    assert len(checkpoints(trainer.checkpoint_dir)) == 2


def test_checkpoint_of_another_architecture_is_refused(make):
    trainer = make()
    trainer.train()
    other = StudentModel(ModelConfig(**SMALL | {"intermediate_size": 64}))
    with pytest.raises(DistillabError, match="holds another model: size mismatch"):
        load_student(other, checkpoints(trainer.checkpoint_dir)[-1])


def test_checkpoint_holds_the_documented_contents(make):
    trainer = make(max_steps=12)
    trainer.train()
    path = checkpoints(trainer.checkpoint_dir)[-1]
    state = read_saved(path).state
    assert (state.current_epoch, state.current_step) == (1, 12)
    assert state.best_val_loss is not None
    saved = json.loads((path / "trainer_state.json").read_text())
    assert TrainingConfig(**saved["training_config"]) == trainer.config
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        assert (path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(make, monkeypatch, number, kind):
    whole = make("whole")
    whole.train()
    trainer = make("stopped")
    step = trainer._step

    def step_and_interrupt(window):
        sums = step(window)
        if trainer.state.current_step == 2:
            signal.raise_signal(number)
        return sums

    monkeypatch.setattr(trainer, "_step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert stopped.type is kind
    assert [path.name for path in checkpoints(trainer.checkpoint_dir)] == ["step-00000002"]
    again = make("stopped")
    again.train(resume=True)
    assert losses(again) == losses(whole)


# ---------------------------------------------------------------- 非有限值


class Poisoned(LocalTeacher):
    """在指定的几次调用里，教师的 hidden state 是 NaN。"""

    def __init__(self, teacher, calls):
        self.teacher, self.calls, self.count = teacher, set(calls), 0
        self.model = teacher.model

    def targets(self, view, vocabulary):
        targets = self.teacher.targets(view, vocabulary)
        if torch.is_grad_enabled():  # 只数训练中的调用
            self.count += 1
            if self.count in self.calls:
                targets.hidden.fill_(math.nan)
        return targets

    def release(self):
        self.teacher.release()


def test_step_that_is_not_finite_is_skipped_counted_and_reported(make, teacher, caplog):
    trainer = make(max_steps=4)
    trainer.teacher = Poisoned(teacher, calls=[2])
    seen = []
    step = trainer._step
    trainer._step = lambda window: (seen.append(weights(trainer).clone()), step(window))[1]
    state = trainer.train()
    assert torch.equal(seen[1], seen[2])  # 第 2 步没有改动任何参数
    assert not torch.equal(seen[2], seen[3])
    assert (state.skipped_steps, state.tokens) == (1, 3 * 44)
    assert "step 2 skipped: loss is not finite (epoch 0, batches 1 to 1)" in caplog.text
    assert weights(trainer).isfinite().all()


def test_ten_such_steps_in_a_row_stop_the_run_with_advice(make, teacher):
    trainer = make(max_steps=20)
    trainer.teacher = Poisoned(teacher, calls=range(4, 100))
    with pytest.raises(
        DistillabError, match=r"stopped at step 13: 10 steps in a row .*learning_rate"
    ):
        trainer.train()


@pytest.fixture
def scaled(monkeypatch):
    """训练循环走 fp16 的路，只是在 CPU 上；返回造 GradScaler 的函数。"""

    def scaled(init_scale, backoff_factor=0.5):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff_factor)

        def scaled_accelerator(*arguments):
            accelerator = make_accelerator(*arguments)
            # Accelerate 只肯在 GPU 上用 fp16；补上它在那里会设的三样，CPU 便照样走 fp16 的路
            accelerator.scaler, accelerator.native_amp = scaler, True
            accelerator.state._mixed_precision = "fp16"
            return accelerator

        monkeypatch.setattr("distillab.train.trainer.make_accelerator", scaled_accelerator)
        return scaler

    return scaled


def test_fp16_lowers_an_overflowing_loss_scale_until_training_goes_on(make, scaled):
    scaler = scaled(2.0**40, backoff_factor=2.0**-8)  # 头几步必然溢出
    trainer = make(max_steps=8)
    before = weights(trainer).clone()
    state = trainer.train()
    assert 0 < state.skipped_steps < 8
    assert scaler.get_scale() < 2.0**40
    assert not torch.equal(weights(trainer), before)
    assert weights(trainer).isfinite().all()


# ---------------------------------------------------------------- optimizer 与日程


def test_norms_and_biases_are_not_decayed(tiny_config):
    student = StudentModel(tiny_config)
    decayed, rest = make_optimizer(student, TrainingConfig()).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in student.named_parameters()}
    spared = {names[id(p)].rsplit(".", 2)[-1] for p in rest["params"]}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in rest["params"])
    assert spared == {"weight", "bias"}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_learning_rate_warms_up_then_falls_along_a_cosine_to_the_floor():
    config = TrainingConfig(learning_rate=1e-3, warmup_steps=10, min_learning_rate=1e-5)
    rates = [1e-3 * learning_rate_factor(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[110] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_warm_up_may_be_a_share_of_all_steps():
    config = TrainingConfig(learning_rate=1e-3, warmup_steps=500, warmup_ratio=0.1)
    rates = [learning_rate_factor(step, 55, config) for step in range(55)]
    assert rates[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])  # 5.5 向上取整
    assert max(rates[6:]) <= 1
    assert learning_rate_factor(0, 55, TrainingConfig(warmup_ratio=0.0)) == 1


@pytest.mark.parametrize(
    ("scheduler", "middle", "end"), [("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_other_schedules(scheduler, middle, end):
    config = TrainingConfig(
        learning_rate=1e-3, warmup_steps=0, min_learning_rate=1e-4, scheduler=scheduler
    )
    assert learning_rate_factor(50, 100, config) == pytest.approx(middle)
    assert learning_rate_factor(100, 100, config) == pytest.approx(end)


def test_every_epoch_sees_all_the_data_in_another_order_that_the_seed_decides(make):
    def order(name, **config):
        trainer = make(name, max_steps=20, **config)
        starts = []
        state, total = trainer.state, trainer.total_steps
        for window in windows(trainer.train_loader, state, 1, total, trainer.watch):
            starts += window[0].student.input_ids[:, 0].tolist()
            state.current_step += 1
        return starts

    found = order("a")
    first, second = found[:40], found[40:]
    assert sorted(first) == sorted(second) == sorted(Chunks().ids[:, 0].tolist())
    assert first != second
    assert order("b") == found
    assert order("c", seed=1) != found


def test_epochs_end_the_run_when_max_steps_does_not(make):
    trainer = make(max_steps=None, num_epochs=2, gradient_accumulation_steps=3)
    state = trainer.train()
    assert state.current_step == 2 * math.ceil(10 / 3)
    assert (state.current_epoch, state.tokens) == (2, 2 * 40 * 11)


def test_warm_up_that_outlasts_the_data_is_pointed_out(make, caplog):
    make(max_steps=None, num_epochs=1, warmup_steps=500)
    assert "warmup_steps=500 is not below the 10 steps of this run" in caplog.text


def test_tensorboard_receives_the_same_numbers(make):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    trainer = make(report_to=["tensorboard"])
    trainer.train()
    logs = event_accumulator.EventAccumulator(str(trainer.run_dir / "distillab"))
    logs.Reload()
    found = [event.value for event in logs.Scalars("train/loss")]
    assert found == pytest.approx([loss for _, loss in losses(trainer)])


def test_a_custom_objective_is_used(make):
    loss = LossConfig(divergence="reverse_kl", alpha=1.0, temperature=1.0)
    custom, default = make("custom", loss=loss), make("default", alpha=1.0, temperature=1.0)
    custom.train()
    default.train()
    assert losses(custom)[0] != losses(default)[0]
