"""``DistillationTrainer``：唯一的训练循环。

一步：取一个累积窗口的 micro-batch -> 数清所有进程的 response token -> 教师目标
-> 学生前向，损失在里面 -> 总和 / 全局 token 数 -> 反向 -> 裁剪 -> 更新。
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch import Batch, collate_text
from .checkpoint import (
    TrainerState,
    checkpoints,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from .config import EvaluateConfig, LossConfig, TrainingConfig
from .distillation_module import DistillationModule
from .engine import (
    global_sum,
    learning_rate_factor,
    make_accelerator,
    make_optimizer,
    resolve_precision,
    warmup_steps,
)
from .errors import DistillabError
from .evaluate import Metrics, student_metrics, teacher_metrics
from .language_model import LanguageModel
from .loaders import StreamLoader, evaluation_loader, steps_in_all, train_loader
from .losses import LossSums
from .metrics import MetricsLog
from .on_policy import OnPolicy, Prepared
from .progress import StopRequest, TrainingProgress
from .targets import Targets
from .teachers import LocalTeacher

logger = logging.getLogger("distillab")

MAX_SKIPPED_IN_A_ROW = 10


class DistillationTrainer:
    """一次训练的完整生命周期：初始化、训练、验证、存盘、恢复。

    Args:
        student: 学生，参数为 float32。
        teacher: 教师；``None`` 时 ``alpha`` 必须为 0，验证也没有 KL。
        train_data: 每项是 ``collate`` 认得的：``input_ids [T]`` 与 ``labels [T]``，或 ``Example``。
        validation_data: 同上。
        config: 训练超参数。
        run_dir: 运行目录；检查点在 ``run_dir/config.checkpoint_dir``，指标在 ``metrics.jsonl``。
        loss: 目标函数；缺省为 ``forward_kl``，``alpha`` 与 ``temperature`` 取自 ``config``。
        evaluate: 验证的批大小与条数。
        vocab_limit: 两个 tokenizer 定义相同的 token 数；缺省为整个词表。
        collate: 把数据项拼成 ``Batch``；缺省用于文本块。
        train_sampler: 训练数据的次序（如按长度分组）；有 ``set_epoch`` 就每轮调用。缺省为随机打乱。
        on_policy: 从学生采样 response；缺省只用数据里的。

    Raises:
        DistillabError: 没有教师而 ``alpha > 0``；数据不足一批；设备不支持 ``precision``。
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: LocalTeacher | None,
        train_data: Dataset[Any],
        validation_data: Dataset[Any],
        config: TrainingConfig,
        run_dir: Path | str,
        *,
        loss: LossConfig | None = None,
        evaluate: EvaluateConfig | None = None,
        vocab_limit: int | None = None,
        collate: Callable[[Sequence[Any]], Batch] | None = None,
        train_sampler: Sampler[int] | None = None,
        on_policy: OnPolicy | None = None,
    ) -> None:
        self.config = config
        self.loss = loss or LossConfig(alpha=config.alpha, temperature=config.temperature)
        self.evaluate_config = evaluate or EvaluateConfig()
        if self.loss.alpha > 0 and teacher is None:
            raise DistillabError(f"loss.alpha={self.loss.alpha:g} needs a teacher, found none")
        set_seed(config.seed)
        self.run_dir = Path(run_dir)
        self.accelerator = make_accelerator(config, self.run_dir)
        precision, device = resolve_precision(config.precision), self.accelerator.device
        logger.info("computing in %s on %s", precision, device)
        self.checkpoint_dir = self.run_dir / config.checkpoint_dir
        self.state = TrainerState(data=getattr(train_data, "fingerprint", None))
        self.learning_rate = 0.0  # 最近一步用的
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(self.accelerator.device)

        self.vocab_limit = vocab_limit or student.vocab_size
        self.collate = collate or partial(collate_text, vocab_limit=self.vocab_limit)
        self.on_policy = on_policy
        self.train_loader = train_loader(
            train_data, self.accelerator, self.collate, config.batch_size, train_sampler
        )
        self.validation_loader = self.evaluation_loader(validation_data)
        reuse = 1 if on_policy is None else on_policy.config.reuse
        self.total_steps = steps_in_all(self.train_loader, config, reuse)
        warmup = warmup_steps(config, self.total_steps)
        if warmup >= self.total_steps:
            logger.warning(
                "train.warmup_steps=%d is not below the %d steps of this run: "
                "the learning rate never reaches its peak",
                warmup, self.total_steps,
            )  # fmt: skip

        if config.activation_checkpointing:
            student.enable_activation_checkpointing()
        module = DistillationModule(student, self.loss, self.vocab_limit, on_policy is not None)
        optimizer = make_optimizer(module, config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.total_steps, config)
        )
        self.module, self.optimizer, self.scheduler = self.accelerator.prepare(
            module, optimizer, scheduler
        )

    @property
    def student(self) -> LanguageModel:
        """去掉引擎包装的学生。"""
        student: LanguageModel = self.accelerator.unwrap_model(self.module).student
        return student

    # ------------------------------------------------------------------ 训练

    def train(
        self, resume: bool = False, on_metrics: Callable[[Path], object] | None = None
    ) -> TrainerState:
        """训练到 ``total_steps``。

        Args:
            resume: 从最新的检查点接着训练；没有检查点就从头开始。
            on_metrics: 每写一行指标就以 ``metrics.jsonl`` 的路径调用，如 ``LiveCurves()``。

        Returns:
            最后的训练进度。

        Raises:
            DistillabError: 连续多步不是有限值，检查点损坏，或训练数据不是原来的。
            KeyboardInterrupt: 收到 Ctrl-C；当前步走完、检查点已存好。
        """
        if resume and (saved := checkpoints(self.checkpoint_dir)):
            self.state = load_checkpoint(self.accelerator, saved[-1], self.state.data)
            logger.info("resumed from %s at step %d", saved[-1], self.state.current_step)
        log = MetricsLog(self.run_dir / "metrics.jsonl", self.accelerator, on_metrics)
        log.discard_after(self.state.current_step)
        progress = TrainingProgress(
            self.total_steps, self.state.current_step, self.accelerator.is_main_process
        )
        with log, progress, StopRequest() as stop:
            for window in self._windows():
                for prepared in self._prepared(window):
                    started = time.perf_counter()
                    sums = self._step(prepared)
                    seconds = time.perf_counter() - started
                    sums["seconds"] = seconds + prepared.seconds
                    self.state.seconds += sums["seconds"]
                    self._record(sums, log, progress)
                    self._validate_and_save(log, progress)
                    if stop.requested:
                        path = self._save()
                        raise KeyboardInterrupt(
                            f"stopped at step {self.state.current_step}: {path}"
                        )
        return self.state

    def _prepared(self, window: list[Batch]) -> Iterator[Prepared]:
        """定下一个窗口的 response；采样的可以按 ``reuse`` 训练不止一步。"""
        if self.on_policy is None:
            yield Prepared(window)
            return
        started = time.perf_counter()
        step, accelerator = self.state.current_step, self.accelerator
        prepared = self.on_policy.prepare(
            window, step, self.total_steps, accelerator.process_index, accelerator.num_processes
        )
        yield replace(prepared, seconds=time.perf_counter() - started)
        for _ in range(self.on_policy.config.reuse - 1):
            if self.state.current_step < self.total_steps:
                yield Prepared(prepared.batches, prepared.sampled)

    def _windows(self) -> Iterator[list[Batch]]:
        """从 ``state`` 记的位置起，逐个给出一个 optimizer 步的 micro-batch。"""
        state, size = self.state, self.config.gradient_accumulation_steps
        if isinstance(self.train_loader, StreamLoader):
            yield from self.train_loader.windows(state, size, self.total_steps)
        while state.current_step < self.total_steps:
            self.train_loader.set_epoch(state.current_epoch)
            loader = skip_first_batches(self.train_loader, state.batches_in_epoch)
            batches = iter(loader)
            while window := list(itertools.islice(batches, size)):
                state.batches_in_epoch += len(window)
                if state.batches_in_epoch >= len(self.train_loader):
                    state.current_epoch, state.batches_in_epoch = state.current_epoch + 1, 0
                yield window
                if state.current_step >= self.total_steps:
                    return

    def _step(self, prepared: Prepared) -> dict[str, float]:
        """一个 optimizer 步；返回全局总和，供记录用。"""
        module, accelerator = self.module.train(), self.accelerator
        window = prepared.batches
        tokens = global_sum(accelerator, sum(len(batch) for batch in window))
        scale = accelerator.num_processes / max(tokens, 1)  # 引擎对各进程的梯度取平均
        sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=accelerator.device)
        for position, batch in enumerate(window):
            last = position == len(window) - 1
            targets = self._targets(batch) if self.loss.alpha > 0 else None
            with nullcontext() if last else accelerator.no_sync(module):  # 最后一个才同步梯度
                part: LossSums = module(batch, targets)
                accelerator.backward(part.total * scale)
            sums += torch.stack([value.detach().double() for value in part])
        norm = accelerator.clip_grad_norm_(module.parameters(), self.config.gradient_clip)
        sums = accelerator.reduce(sums, reduction="sum")
        losses = dict(zip(LossSums._fields, sums.tolist(), strict=True))
        total = losses["total"]
        norm = float(norm)

        self.state.current_step += 1
        self.learning_rate = self.scheduler.get_last_lr()[0]
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite or accelerator.scaler is not None:
            self.optimizer.step()  # 有 GradScaler 时，它自己跳过溢出的一步并调低 loss scale
        if finite:
            self.scheduler.step()
            self.state.tokens += int(tokens)
            self.state.skipped_in_a_row = 0
        self.optimizer.zero_grad()
        if not finite:
            self._skipped("loss" if not math.isfinite(total) else "gradient norm", len(window))
            return {}
        rollout = prepared.totals(accelerator, losses, tokens) if prepared.sampled else {}
        return rollout | {
            "steps": 1,
            "tokens": tokens,
            "loss": total,
            "divergence": losses["divergence"],
            "cross_entropy": losses["cross_entropy"],
            "grad_norm": norm,
        }

    def _targets(self, batch: Batch) -> Targets | None:
        if self.teacher is None:
            return None
        return self.teacher.targets(batch.teacher, self.vocab_limit)

    def _skipped(self, what: str, batches: int) -> None:
        state = self.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        end = state.batches_in_epoch or len(self.train_loader)
        epoch = state.current_epoch - (state.batches_in_epoch == 0)
        scaler = self.accelerator.scaler
        scale = f"; loss scale is now {scaler.get_scale():g}" if scaler is not None else ""
        logger.warning(
            "step %d skipped: %s is not finite (epoch %d, batches %d to %d)%s",
            state.current_step, what, epoch, end - batches, end - 1, scale,
        )  # fmt: skip
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DistillabError(
                f"stopped at step {state.current_step}: {MAX_SKIPPED_IN_A_ROW} steps in a row were "
                f"not finite; try a lower train.learning_rate (now {self.config.learning_rate:g}), "
                f"more train.warmup_steps, or train.precision=fp32"
            )

    # ------------------------------------------------------------------ 记录、验证、存盘

    def _record(self, sums: dict[str, float], log: MetricsLog, progress: TrainingProgress) -> None:
        state = self.state
        state.add(sums)
        if tokens := sums.get("tokens"):
            losses = {key: sums[key] / tokens for key in ("loss", "divergence", "cross_entropy")}
            progress.step(state.current_step, tokens / sums["seconds"], losses)
        if state.current_step % self.config.log_interval and state.current_step < self.total_steps:
            return
        row = {"kind": "train", **state.close_interval(), "learning_rate": self.learning_rate}
        log.write(row)
        progress.log(row)

    def _validate_and_save(self, log: MetricsLog, progress: TrainingProgress) -> None:
        state, config = self.state, self.config
        final = state.current_step == self.total_steps
        if state.current_step % config.eval_interval == 0 or final:
            metrics, _ = self.evaluate(progress)
            log.write({"kind": "validation", "step": state.current_step,
                       "tokens": state.tokens, **metrics})  # fmt: skip
            progress.validated(state.current_step, metrics)
            if state.best_val_loss is None or metrics["cross_entropy"] < state.best_val_loss:
                state.best_val_loss, state.best_step = metrics["cross_entropy"], state.current_step
                save_best(self.accelerator, self.module, self.checkpoint_dir, state, config)
        if state.current_step % config.save_interval == 0 or final:
            self._save()

    def _save(self) -> Path:
        return save_checkpoint(self.accelerator, self.checkpoint_dir, self.state, self.config)

    def evaluate(
        self,
        progress: TrainingProgress | None = None,
        loader: DataLoader[Any] | None = None,
        teacher: bool = True,
    ) -> tuple[Metrics, Metrics | None]:
        """评测当前的学生；教师的成绩由同一次前向得出。

        Args:
            progress: 显示验证进度的进度条，可以没有。
            loader: ``evaluation_loader`` 的返回值；缺省为验证集。
            teacher: 要不要与教师比较。

        Returns:
            ``(学生, 教师)``；没有或不要教师时后者为 ``None``。
        """
        compared = teacher and self.teacher is not None
        module = self.module.eval()
        totals = torch.zeros(len(LossSums._fields) + 1, dtype=torch.float64)
        totals = totals.to(self.accelerator.device)
        loader = loader or self.validation_loader
        batches: Iterable[Batch] = loader
        if progress is not None:
            batches = progress.track(batches, "validating", len(loader))
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(self.accelerator.device)
                sums: LossSums = module(batch, self._targets(batch) if compared else None)
                totals[0] += len(batch)
                totals[1:] += torch.stack(sums)
        totals = self.accelerator.reduce(totals, reduction="sum")
        tokens, sums = int(totals[0]), LossSums(*totals[1:].unbind())
        module.train()
        student = student_metrics(sums, tokens, compared)
        return student, teacher_metrics(sums, tokens) if compared else None

    # ------------------------------------------------------------------ 数据

    def evaluation_loader(
        self,
        data: Dataset[Any],
        collate: Callable[[Sequence[Any]], Batch] | None = None,
        max_sequences: int | None = None,
    ) -> DataLoader[Any]:
        """每个进程一份互不重叠的数据；从头到尾均匀地取，每次都是同样的若干条。

        Args:
            data: 要评测的数据。
            collate: 缺省为训练用的。
            max_sequences: 取几条；缺省为 ``evaluate.max_sequences``。

        Raises:
            DistillabError: 一条也没有。
        """
        return evaluation_loader(
            data,
            self.accelerator,
            collate or self.collate,
            batch_size=self.evaluate_config.batch_size,
            max_sequences=max_sequences or self.evaluate_config.max_sequences,
        )
