"""``train_step.py`` 测的东西：各家各自的训练循环，模型与 token 在 ``train_step_models.py``。"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from train_step_clock import Clock
from train_step_models import Cell, make_models, make_peer_models, make_tokens

if TYPE_CHECKING:
    from distillab.train.trainer import DistillationTrainer

LEARNING_RATE = 5e-5
GRADIENT_CLIP = 1.0

STAGES = [
    "teacher body",
    "student body forward",
    "loss: heads, values, gradients",
    "student body backward",
    "gradient clip",
    "optimizer step",
    "other",
]
"""``--profile`` 的各段；head 与损失的梯度在前向里就算完，所以反向里只剩学生的主体。"""


def make_trainer(
    cell: Cell, directory: Path | str, **settings: Any
) -> tuple[DistillationTrainer, list[Any]]:
    """``DistillationTrainer`` 与它的数据；``settings`` 是 ``TrainingConfig`` 别的键。"""
    from distillab.config.schema import LossConfig, TrainingConfig
    from distillab.models.interface import PretrainedLM
    from distillab.models.own_blocks import through_own_blocks
    from distillab.teachers.in_process import LocalTeacher
    from distillab.train.trainer import DistillationTrainer

    teacher, student = make_models(cell)
    ids = make_tokens(cell)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    data: Any = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    config = TrainingConfig(
        batch_size=cell.batch_size,
        learning_rate=LEARNING_RATE,
        scheduler="constant",
        warmup_steps=0,
        num_epochs=10**6,
        gradient_clip=GRADIENT_CLIP,
        precision=cell.precision,
        seed=cell.seed,
        **settings,
    )
    loss = LossConfig(divergence="forward_kl", alpha=cell.alpha, temperature=1.0)
    frozen: Any = PretrainedLM(teacher)
    if cell.device == "cuda":  # 与 distillab train 相同
        frozen = through_own_blocks(frozen)
    local = LocalTeacher(frozen)
    return DistillationTrainer(student, local, data, data, config, directory, loss=loss), data


def distillab_loop(cell: Cell, clock: Clock, **settings: Any) -> None:
    """``DistillationTrainer``：``alpha * KL(教师||学生) + (1 - alpha) * CE``，按 token 平均。

    每步就是 ``_step``，连同它自己的等待与记账；``settings`` 是 ``TrainingConfig`` 的键。
    """
    from distillab.batch import collate_text
    from distillab.train.compilation import record_bodies
    from distillab.train.on_policy import Prepared

    with tempfile.TemporaryDirectory() as directory:
        trainer, data = make_trainer(cell, directory, **settings)
        assert trainer.teacher is not None
        clock.watch(trainer.teacher.model, "forward", "teacher body")
        clock.watch(trainer.student, "forward", "student body forward")
        clock.watch(trainer.module, "forward", "loss: heads, values, gradients")
        clock.watch(trainer.accelerator, "backward", "student body backward")
        clock.watch(trainer.accelerator, "clip_grad_norm_", "gradient clip")
        clock.watch(trainer.optimizer.optimizer, "step", "optimizer step")
        batch = collate_text(data).to(cell.device)
        record_bodies(
            trainer.student, trainer.teacher.model, lambda: batch, trainer._compute
        )  # 如 train()
        window = Prepared([batch])
        more = True
        while more:
            clock.start()
            loss, divergence = trainer._step(window).totals[:2] / cell.trained_tokens  # 还在设备上
            more = clock.stop(loss=loss, divergence=divergence)


def compiled_loop(cell: Cell, clock: Clock) -> None:
    """同上，``train.compile: true``；编译在热身的两步里，不计时。"""
    distillab_loop(cell, clock, compile=True)


def autocast(cell: Cell) -> torch.autocast:
    """``cell.precision`` 的 autocast；``fp32`` 时不起作用。"""
    half = torch.float16 if cell.precision == "fp16" else torch.bfloat16
    return torch.autocast(cell.device, half, enabled=cell.precision != "fp32")


def time_steps(trainer: Any, clock: Clock) -> None:
    """让 ``transformers.Trainer`` 的每一步经过 ``clock``：从 ``on_step_begin`` 到 ``on_step_end``，
    取数据不计，计数、nan 检查、回调都计。它的日志在 ``on_step_end`` 之后，来不及，所以自己记损失。
    """
    from transformers import TrainerCallback

    call, last = trainer.training_step, {}

    def training_step(*args: Any, **kwargs: Any) -> Any:
        last["loss"] = call(*args, **kwargs)
        return last["loss"]

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses = dict.fromkeys(("loss", "divergence"), last["loss"])
            control.should_training_stop = not clock.stop(**losses)

    trainer.training_step = training_step
    trainer.add_callback(Timed())


def trainer_settings(cell: Cell, directory: str) -> dict[str, Any]:
    """``TrainingArguments`` 的参数，其余是缺省。"""
    return {
        "output_dir": directory,
        "per_device_train_batch_size": cell.batch_size,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": GRADIENT_CLIP,
        "bf16": cell.precision == "bf16",  # GKDConfig 缺省是 True，CPU 上也是
        "fp16": cell.precision == "fp16",
        "use_cpu": cell.device == "cpu",
        "max_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": cell.seed,
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """一批 token；标签就是它们自己，由模型移一位。"""
    batch = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": batch, "attention_mask": batch.new_ones(batch.shape), "labels": batch}


def trl_loop(cell: Cell, clock: Clock, checkpointing: bool = False) -> None:
    """TRL 的 ``GKDTrainer.train()``：``KL(教师||学生)``，按 token 平均；没有交叉熵。

    ``lmbda=0``：只用给定的 token，不生成；``beta=0``：KL(教师||学生)。它的 ``temperature`` 只管
    生成，``compute_loss`` 不看，散度总是 T = 1。batch 的键就是它的 collator 给的、``compute_loss``
    读的那些。其余是 ``GKDConfig`` 的缺省，唯有激活重算见 ``trl_defaults_loop``。
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = make_peer_models(cell)
    vocabulary = models.WordLevel({"<eos>": 0}, unk_token="<eos>")  # 它要一个 tokenizer，但用不上
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary), eos_token="<eos>", pad_token="<eos>"
    )
    with tempfile.TemporaryDirectory() as directory:
        config = GKDConfig(
            **trainer_settings(cell, directory),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            gradient_checkpointing=checkpointing,
        )
        trainer = GKDTrainer(
            student,
            teacher,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": make_tokens(cell).tolist()}),
            processing_class=tokenizer,
        )
        time_steps(trainer, clock)
        trainer.train()


def trl_defaults_loop(cell: Cell, clock: Clock) -> None:
    """同上，不动 ``gradient_checkpointing`` 的缺省值 True：慢而省内存。"""
    trl_loop(cell, clock, checkpointing=True)


def liger_loop(cell: Cell, clock: Clock) -> None:
    """``transformers.Trainer``，损失是 Liger 的分块 JSD，其余是缺省；与 ``distillab`` 算的相同。

    GPU 上两个模型的主体也换成 Liger 的内核。``beta=0`` 是 KL(教师||学生)。
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from transformers import Trainer, TrainingArguments

    teacher, student = make_peer_models(cell)
    if cell.device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        for model in (teacher, student):
            apply_liger_kernel_to_qwen2(model=model, fused_linear_cross_entropy=False)
    teacher.to(cell.device)
    objective = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - cell.alpha, weight_soft_loss=cell.alpha, beta=0.0
    )

    class Distilling(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            ids = inputs["input_ids"]
            with autocast(cell):
                with torch.no_grad():
                    wanted = teacher.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
                hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
                loss: Tensor = objective(
                    hidden, model.lm_head.weight, wanted, teacher.lm_head.weight,
                    ids[:, 1:].flatten(),
                )  # fmt: skip
            return loss

    with tempfile.TemporaryDirectory() as directory:
        trainer = Distilling(
            student,
            TrainingArguments(**trainer_settings(cell, directory)),
            data_collator=collate,
            train_dataset=[{"input_ids": row} for row in make_tokens(cell).tolist()],
        )
        time_steps(trainer, clock)
        trainer.train()


def plain_loop(cell: Cell, clock: Clock) -> None:
    """第一个脚本的写法：两份完整的 logits；算的与 ``distillab`` 相同。"""
    teacher, student = make_peer_models(cell)
    teacher, student = teacher.to(cell.device), student.to(cell.device).train()
    input_ids = make_tokens(cell).to(cell.device)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    alpha, temperature = cell.alpha, 1.0

    def train_step() -> tuple[Tensor, Tensor]:
        with autocast(cell):
            with torch.no_grad():
                teacher_logits = teacher(**batch).logits
            outputs = student(**batch, labels=input_ids)  # 交叉熵由它算，labels 在里面移一位
        student_rows = outputs.logits[:, :-1].flatten(0, 1).float() / temperature
        teacher_rows = teacher_logits[:, :-1].flatten(0, 1).float() / temperature
        kl = F.kl_div(
            F.log_softmax(student_rows, dim=-1),
            F.softmax(teacher_rows, dim=-1),
            reduction="batchmean",  # 行是 token，所以是按 token 平均
        )
        loss = alpha * kl * temperature**2 + (1 - alpha) * outputs.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), kl.detach()

    more = True
    while more:
        clock.start()
        loss, kl = train_step()
        more = clock.stop(loss=loss, divergence=kl)


LOOPS: dict[str, Callable[[Cell, Clock], None]] = {
    "distillab": distillab_loop,
    "distillab-compiled": compiled_loop,
    "trl": trl_loop,
    "trl-defaults": trl_defaults_loop,
    "liger": liger_loop,
    "plain": plain_loop,
}
IMPLEMENTATIONS = list(LOOPS)
PEERS = {
    "trl": "trl", "trl-defaults": "trl", "liger": "liger-kernel", "plain": "transformers",
}  # fmt: skip
"""不是本项目的实现，以及它的发行包。"""


def factor_to_mean(implementation: str) -> float:
    """损失乘上它之后是每个有目标的 token 的平均；目前各家都已经是。

    TRL 除以 ``num_items_in_batch``：Trainer 数的是移位之后的标签，共 ``B * (T - 1)`` 个，而不是
    ``B * T`` 个。与 ``distillab`` 的散度不符时，``train_step.py`` 会警告。
    """
    return 1.0
