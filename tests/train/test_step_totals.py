"""总和晚一步才读，与当场就读是同一次训练；不是有限值的一步由设备自己跳过，不留痕迹。"""

import math

import pytest
import torch
from test_trainer import Poisoned, losses, make, scaled, teacher, weights  # noqa: F401 - fixture

from distillab.errors import DistillabError
from distillab.run_file_shapes import read_metrics
from distillab.train import trainer as trainer_module
from distillab.train.step_totals import Launched

LATE = {"log_interval": 100, "max_steps": 12, "dropout": 0.2}
"""一轮 10 步，走完之前没有一步要当场读。"""


def nan_gradient(trainer):
    """损失有限，一个参数的梯度不是。"""

    def poison(gradient):
        hook.remove()
        return gradient * math.nan

    hook = next(trainer.student.parameters()).register_hook(poison)


def nan_loss(trainer):
    """梯度有限，损失不是。"""
    forward = trainer.module.forward

    def poisoned(*arguments):
        trainer.module.forward = forward
        sums = forward(*arguments)
        return sums._replace(total=sums.total + math.nan)

    trainer.module.forward = poisoned


def poisoned_at(trainer, step, poison):
    run = trainer._step

    def poisoned(prepared):
        if trainer.state.current_step + 1 == step:
            poison(trainer)
        return run(prepared)

    trainer._step = poisoned
    return trainer


def assert_same_training(left, right):
    """训练改变的一切都相同，时间除外。"""
    timed = ("seconds", "interval", "run", "metrics")
    for trainer in (left, right):
        trainer.states = {k: v for k, v in vars(trainer.state).items() if k not in timed}
    assert left.states == right.states
    assert left.scheduler.state_dict() == right.scheduler.state_dict()
    assert torch.equal(weights(left), weights(right))
    for one, other in zip(*(t.optimizer.state_dict()["state"].values() for t in (left, right)),
                          strict=True):  # fmt: skip
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_a_step_is_read_when_the_next_one_is_on_its_way(make, monkeypatch):  # noqa: F811
    trainer, events = make(**LATE | {"max_steps": 3}), []

    def noted(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (events.append(name), call(*a, **k))[1])

    noted(trainer.accelerator, "backward")
    noted(trainer_module, "update")
    noted(Launched, "read")
    trainer.train()
    assert events == ["backward", "update", *["backward", "read", "update"] * 2, "read"]


@pytest.mark.parametrize("interval", ["log_interval", "eval_interval", "save_interval"])
def test_what_is_due_is_read_at_once(make, interval):  # noqa: F811
    trainer = make(**LATE | {"max_steps": 3, interval: 2})
    step, seen = trainer._step, []
    trainer._step = lambda prepared: (seen.append(trainer.state.tokens), step(prepared))[1]
    trainer.train()
    assert seen == [0, 0, 2 * 44]


@pytest.mark.parametrize(
    ("poison", "step"), [(None, 0), (nan_gradient, 1), (nan_loss, 10), (nan_gradient, 12)]
)
def test_reading_late_changes_nothing(make, poison, step):  # noqa: F811
    def trained(name, **config):
        trainer = make(name, **LATE | config)  # 造它的时候定下随机数
        if poison is not None:
            poisoned_at(trainer, step, poison)
        trainer.train()
        return trainer

    late, once = trained("late"), trained("once", log_interval=1)
    assert_same_training(late, once)
    (row,) = [row for row in read_metrics(late.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    found = [loss for _, loss in losses(once) if loss is not None]
    assert len(found) == 12 - (poison is not None)
    assert row["loss"] == pytest.approx(sum(found) / len(found), rel=1e-9)
    assert row["skipped_steps"] == late.state.skipped_steps == (poison is not None)
    assert row["seconds"] == pytest.approx(late.state.seconds, abs=1e-3)


@pytest.mark.parametrize(("poison", "step"), [(nan_loss, 1), (nan_gradient, 4)])
def test_the_device_skips_as_the_host_would(make, monkeypatch, poison, step):  # noqa: F811
    own = poisoned_at(make("own", **LATE | {"max_steps": 5}), step, poison)
    own.train()
    assert own.optimizer.state_dict()["state"][0]["step"] == 4

    def by_the_host(accelerator, optimizer, found_inf):
        if not found_inf:
            optimizer.step()

    monkeypatch.setattr(trainer_module, "update", by_the_host)
    plain = poisoned_at(make("plain", **LATE | {"max_steps": 5}), step, poison)
    plain.train()
    assert_same_training(own, plain)


def test_a_skipped_step_is_reported_with_its_own_batches(make, caplog):  # noqa: F811
    late = LATE | {"max_steps": 5, "gradient_accumulation_steps": 4}
    trainer = poisoned_at(make(**late), 3, nan_loss)
    trainer.train()  # 一轮三步，第三步只有两批；读到它时已经取了下一轮的
    assert "step 3 skipped: loss is not finite (epoch 0, batches 8 to 9)" in caplog.text


def test_ten_skipped_steps_stop_a_run_that_reads_late(make, teacher):  # noqa: F811
    trainer = make(**LATE | {"max_steps": 20})
    trainer.teacher = Poisoned(teacher, calls=range(4, 100))
    before = []
    step = trainer._step
    trainer._step = lambda prepared: (before.append(weights(trainer).clone()), step(prepared))[1]
    with pytest.raises(DistillabError, match="stopped at step 13: 10 steps in a row"):
        trainer.train()
    assert torch.equal(before[3], weights(trainer))


@pytest.mark.parametrize("poison", [nan_gradient, nan_loss])
def test_with_a_loss_scale_both_kinds_are_skipped_too(make, scaled, poison):  # noqa: F811
    scaler = scaled(2.0**4)
    trainer = poisoned_at(make(**LATE | {"max_steps": 5}), 3, poison)
    trainer.train()
    assert trainer.state.skipped_steps == 1
    assert trainer.optimizer.state_dict()["state"][0]["step"] == 4
    assert weights(trainer).isfinite().all()
    assert scaler.get_scale() == 2.0**4 / (2 if poison is nan_gradient else 1)
