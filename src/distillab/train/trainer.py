"""``DistillationTrainer``：唯一的训练循环。

一步：取一个累积窗口的 micro-batch -> 数清所有进程的 response token -> 教师目标
-> 学生前向，损失在里面 -> 总和 / 全局 token 数 -> 反向 -> 裁剪 -> 更新。主机只管发，不等设备：上
一步的总和在这一步更新之前才读。
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batch import Batch, collate_text
from ..config.run_dir import checkpoint_dir
from ..config.schema import EvaluateConfig, LossConfig, TrainingConfig
from ..distributed.engine import (
    DTYPES,
    engine_name,
    loss_scale,
    make_accelerator,
    prepare,
    resolve_precision,
    update,
)
from ..distributed.sharding import WholeCopy
from ..distributed.watch import Watch
from ..errors import DistillabError
from ..loss.losses import LossSums
from ..models.interface import LanguageModel
from ..signals import StopRequest
from ..targets import Targets
from ..teachers.stored import Teacher
from ..vocabulary import Vocabulary
from .checkpoint import begin, resume_newest, save_best, save_checkpoint
from .compilation import prepare_bodies, record_bodies, training_step
from .loaders import evaluation_loader, in_step, source_names, steps_in_all, train_loader, windows
from .metrics import MetricsLog
from .module import DistillationModule
from .on_policy import OnPolicy, Prepared
from .profiling import phase, profiled_step
from .progress import TrainingProgress
from .skips import Used, check_failed_rows, report_failed_rows
from .state import TrainerState
from .step_totals import Launched, Ledger
from .two_tokenizers import Across
from .validation import Metrics, validated, validation_sums

logger = logging.getLogger("distillab")


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
        vocabulary: 两个 tokenizer 定义相同的 token；缺省为整个词表。
        collate: 把数据项拼成 ``Batch``；缺省用于文本块。
        train_sampler: 训练数据的次序（如按长度分组）；有 ``set_epoch`` 就每轮调用。缺省为随机打乱。
        on_policy: 从学生采样 response；缺省只用数据里的。
        across: 每个 token 的字节数，与教师用自己的分词器时它的词表；缺省两边相同，不知道字节。

    Raises:
        DistillabError: 没有教师而 ``alpha > 0``；数据不足一批；设备不支持 ``precision``。
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: Teacher | None,
        train_data: Dataset[Any],
        validation_data: Dataset[Any],
        config: TrainingConfig,
        run_dir: Path | str,
        *,
        loss: LossConfig | None = None,
        evaluate: EvaluateConfig | None = None,
        vocabulary: Vocabulary | None = None,
        collate: Callable[[Sequence[Any]], Batch] | None = None,
        train_sampler: Sampler[int] | None = None,
        on_policy: OnPolicy | None = None,
        across: Across | None = None,
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
        self._compute = DTYPES[precision]
        logger.info("computing in %s on %s", precision, device)
        self.checkpoint_dir = checkpoint_dir(self.run_dir, config.checkpoint_dir)
        self.state = TrainerState(data=getattr(train_data, "fingerprint", None))
        self.learning_rate = 0.0  # 最近一步用的
        self.watch = Watch(self.accelerator, config.timeout_minutes)
        self.stop = StopRequest()
        self._failed_rows = 0  # 本进程跳过、还没有归约的行
        self.ledger = Ledger()
        self.teacher = teacher
        if teacher is not None:
            teacher.place(device)

        self.vocabulary = vocabulary or Vocabulary(student.vocab_size)
        self.across = (across or Across()).to(self.accelerator.device)
        self.teacher_vocabulary = self.across.teacher_vocabulary or self.vocabulary
        self.collate = collate or partial(collate_text, vocabulary=self.vocabulary)
        self.on_policy = on_policy
        self.train_loader = train_loader(
            train_data, self.accelerator, self.collate, config.batch_size, train_sampler
        )
        self.validation_loader = self.evaluation_loader(validation_data)
        reuse = 1 if on_policy is None else on_policy.config.reuse
        self.total_steps = steps_in_all(self.train_loader, config, reuse)
        prepare_bodies(
            student,
            None if teacher is None else teacher.model,
            config,
            self.total_steps,
            cuda=device.type == "cuda",
            engine=engine_name(self.accelerator),
        )
        sharded = engine_name(self.accelerator) not in ("single", "ddp")
        self._copy = WholeCopy(student, device) if sharded else None
        module = DistillationModule(
            student, self.loss, self.vocabulary, on_policy is not None, self.across
        )
        self.module, self.optimizer, self.scheduler = prepare(
            self.accelerator, module, config, self.total_steps
        )

    @property
    def student(self) -> LanguageModel:
        """去掉引擎包装的学生。"""
        student: LanguageModel = self.accelerator.unwrap_model(self.module).student
        return student

    def whole_student(
        self, keep: bool = True, compute: torch.dtype = torch.float32
    ) -> AbstractContextManager[LanguageModel]:
        """权重完整的学生，供生成与导出；分片时是一份拷贝，参数见 ``WholeCopy.filled``。"""
        if self._copy is None:
            return nullcontext(self.student)
        return self._copy.filled(self.module, keep, compute)

    @contextmanager
    def _sampled_student(self) -> Iterator[LanguageModel]:
        """供采样的完整的学生，与训练的前向同样精度。"""
        device, compute = self.accelerator.device.type, self._compute
        with (
            torch.autocast(device, compute, enabled=compute != torch.float32),
            self.whole_student(compute=compute) as student,
        ):
            yield student

    # ------------------------------------------------------------------ 训练

    def train(
        self, resume: bool = False, on_metrics: Callable[[Path], object] | None = None
    ) -> TrainerState:
        """训练到 ``total_steps``：走一步，记录，到时候就验证、存盘，该停就停。

        Args:
            resume: 从最新的检查点接着训练；没有检查点就从头开始。
            on_metrics: 每写一行指标就以 ``metrics.jsonl`` 的路径调用，如 ``LiveCurves()``。

        Returns:
            最后的训练进度。

        Raises:
            DistillabError: 连续多步不是有限值，检查点损坏、是别的运行的，或训练数据不是原来的。
            KeyboardInterrupt: Ctrl-C、SIGTERM 或 SIGHUP，见 ``StopRequest``；这一步走完、已存好。
        """
        accelerator, size = self.accelerator, self.config.gradient_accumulation_steps
        step = self._begin(resume)
        teacher = None if self.teacher is None else self.teacher.model
        record_bodies(self.student, teacher, self._sample, self._compute)
        coming = windows(self.train_loader, self.state, size, self.total_steps, self.watch)
        log = MetricsLog(self.run_dir / "metrics.jsonl", accelerator, on_metrics)
        log.recover(step, self.state.metrics)
        progress = TrainingProgress(self.total_steps, step, accelerator.is_main_process)
        self.ledger.progress, self.ledger.since = progress, time.perf_counter()
        with self.stop as stop, log, progress, self.watch:
            for window in coming:
                self._failed_rows += report_failed_rows(window)
                for prepared in self._prepared(window):
                    started = time.perf_counter()
                    self._step(prepared)
                    if self._due():
                        self._settle()
                        stopping = stop.decision(accelerator.num_processes) is not None
                        self._record(log, progress)
                        self._validate_and_save(log, progress, stopping)
                        if stopping:
                            raise stop.stopped(f"stopped at step {self.state.current_step}")
                        self.ledger.since = time.perf_counter()
                    stop.check_grace(time.perf_counter() - started)
                    check_failed_rows(self.state)
        return self.state

    def _sample(self) -> Batch:
        """与训练的一批同样大小的一批；文本块的形状也同样。"""
        return self.collate([self.validation_loader.dataset[0]] * self.config.batch_size)

    def _begin(self, resume: bool) -> int:
        """清掉上次被杀留下的，接上最新的检查点；返回从第几步接着来。"""
        accelerator, directory, state = self.accelerator, self.checkpoint_dir, self.state
        run = begin(accelerator, self.run_dir, directory, not resume and state.current_step == 0)
        if resume:
            found = resume_newest(accelerator, directory, state.data, self.config, run)
            if found:
                self.state, path = found
                self.ledger.launched = None
                logger.info("resumed from %s at step %d", path, self.state.current_step)
        self.state.run = run
        return self.state.current_step

    def _prepared(self, window: list[Batch]) -> Iterator[Prepared]:
        """定下一个窗口的 response；采样的可以按 ``reuse`` 训练不止一步。"""
        if self.on_policy is None:
            yield Prepared(window)
            return
        rank = self.accelerator.process_index, self.accelerator.num_processes
        self.watch.at("sampling")
        with phase("sampling"):
            prepared = self.on_policy.prepare(
                window, self.state.current_step, self.total_steps, *rank, self._sampled_student
            )
        yield prepared
        for _ in range(self.on_policy.config.reuse - 1):
            if self.state.current_step < self.total_steps:
                yield Prepared(prepared.batches, prepared.sampled)

    @profiled_step()
    @training_step()
    def _step(self, prepared: Prepared) -> Launched:
        """一个 optimizer 步：都发给设备，不等它算完；总和由 ``_settle`` 晚一步才读。"""
        accelerator, window, state = self.accelerator, prepared.batches, self.state
        self.watch.at("forward and backward", state.current_step + 1)
        tokens = sum(len(batch) for batch in window)
        sums = self._backward(window, loss_scale(accelerator, tokens))
        with phase("gradient clip"):
            parameters = self.module.parameters()
            norm = accelerator.clip_grad_norm_(parameters, self.config.gradient_clip)
        self._settle()  # 上一步算不算数，定下这一步的学习率；设备这时有这一步的前向与反向可做
        state.current_step += 1
        self.learning_rate = self.scheduler.get_last_lr()[0]
        used = Used.of(state, len(window), self.train_loader)
        votes = self.stop.votes()
        launched = Launched(accelerator, prepared, sums, norm, self._failed_rows, votes, used)
        self.ledger.launched, self._failed_rows = launched, 0
        with phase("optimizer"):
            update(accelerator, self.optimizer, launched.found_inf)
        self.optimizer.zero_grad()
        return launched

    def _settle(self) -> None:
        """看发出去的那一步的总和；没有就什么也不做。"""
        rate, scaler = self.config.learning_rate, self.accelerator.scaler
        self.ledger.settle(self.state, self.stop, self.scheduler, rate, scaler)

    def _due(self) -> bool:
        """这一步之后就要看总和。"""
        config, step = self.config, self.state.current_step
        intervals = config.log_interval, config.eval_interval, config.save_interval
        return (
            step == self.total_steps
            or any(step % interval == 0 for interval in intervals)
            or self.stop.decision(self.accelerator.num_processes) is not None
            or engine_name(self.accelerator).startswith("zero")  # 在反向里更新，学习率那时就要定了
        )

    def _backward(self, window: list[Batch], scale: float | Tensor) -> Tensor:
        """整个窗口的梯度，``scale`` 倍；返回本进程的 ``LossSums`` 之和 ``[6]``，float64。"""
        module, accelerator = self.module, self.accelerator
        module.train()  # DeepSpeed 的不返回自己
        sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=accelerator.device)
        for position, batch in enumerate(window):
            last = position == len(window) - 1
            targets = self._targets(batch) if self.loss.alpha > 0 else None
            accelerator.sync_gradients = last  # DeepSpeed 凭它知道窗口到头了，反向之后就更新
            with nullcontext() if last else accelerator.no_sync(module):  # 最后一个才同步梯度
                part: LossSums = module(batch, targets)
                with phase("backward"):
                    accelerator.backward(part.total * scale)
            sums += torch.stack(part).detach()
        if self.teacher is not None:
            self.teacher.release()
        return sums

    def _targets(self, batch: Batch) -> Targets | Teacher | None:
        if self.teacher is None or self.teacher.inside:
            return self.teacher  # 后者在学生的 forward 里取目标
        with phase("teacher forward"):
            return self.teacher.of(batch, self.teacher_vocabulary)

    # ------------------------------------------------------------------ 记录、验证、存盘

    def _record(self, log: MetricsLog, progress: TrainingProgress) -> None:
        state = self.state
        if state.current_step % self.config.log_interval and state.current_step < self.total_steps:
            return
        row = {"kind": "train", **state.close_interval(), "learning_rate": self.learning_rate}
        log.write(row)
        progress.log(row)

    def _validate_and_save(
        self, log: MetricsLog, progress: TrainingProgress, stopping: bool
    ) -> None:
        state, config = self.state, self.config
        final = state.current_step == self.total_steps
        if state.current_step % config.eval_interval == 0 or final:
            metrics, _ = self.evaluate(progress)
            now = {"step": state.current_step, "tokens": state.tokens}
            log.write({"kind": "validation", **now, **metrics})
            progress.validated(state.current_step, metrics)
            if state.best_val_loss is None or metrics["cross_entropy"] < state.best_val_loss:
                state.best_val_loss, state.best_step = metrics["cross_entropy"], state.current_step
                save_best(self.accelerator, self.module, self.checkpoint_dir, state, config)
        if state.current_step % config.save_interval == 0 or final or stopping:
            self.watch.at("saving")
            state.metrics = log.mark()
            save_checkpoint(self.accelerator, self.checkpoint_dir, state, config)

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
        loader = loader or self.validation_loader
        batches: Iterable[Batch] = loader
        if progress is not None:
            batches = progress.track(batches, "validating", len(loader))
        counted = in_step(batches, loader, self.accelerator)
        targets = self._targets if compared else lambda _: None
        names = source_names(loader)
        found = validation_sums(
            self.accelerator, self.module, counted, targets, self.watch, self.across, len(names)
        )
        if self.teacher is not None:
            self.teacher.release()
        return validated(found, names, compared, self.across.teacher_vocabulary is None)

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
