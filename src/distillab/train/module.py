"""``DistillationModule``：学生与损失合成的一个模块，引擎包装的就是它。"""

from __future__ import annotations

from torch import nn

from ..batch import Batch
from ..config.schema import LossConfig
from ..loss.aligned import aligned_distillation_loss
from ..loss.fused import fused_distillation_loss
from ..loss.losses import LossSums
from ..models.interface import LanguageModel
from ..targets import HiddenTargets, Targets
from ..teachers.stored import Teacher
from ..vocabulary import Vocabulary
from .profiling import phase
from .two_tokenizers import Across
from .validation import ACROSS, WITH_TEACHER, WITHOUT_TEACHER


class DistillationModule(nn.Module):
    """学生与损失合成的一个模块：损失在 ``forward`` 里，DDP、FSDP2、ZeRO-3 的 hook 自然触发。

    ``label_metrics`` 时，``alpha`` 为 1 也要两个交叉熵：学生自己的 response 上，它们就是学生的熵与
    教师的 log 概率的估计。
    """

    def __init__(
        self,
        student: LanguageModel,
        loss: LossConfig,
        vocabulary: Vocabulary,
        label_metrics: bool = False,
        across: Across | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.vocabulary = vocabulary
        self.label_metrics = label_metrics
        self.across = across or Across()
        self._no_split_modules = student.block_names  # FSDP2 凭它找到各层

    def forward(self, batch: Batch, targets: Targets | Teacher | None) -> LossSums:
        """训练时是训练的目标函数，eval 时是验证的；都是总和，从不做除法。

        教师就是关掉 adapter 的学生时，它的目标也在这里算：分片的权重只在 forward 里是完整的。
        """
        if isinstance(targets, Teacher):
            with phase("teacher forward"):
                theirs = self.across.teacher_vocabulary or self.vocabulary
                targets = targets.of(batch, theirs)
        with phase("student forward"):
            rows = self.student.read(batch.student)
        loss = self.loss
        if not self.training:
            loss = WITHOUT_TEACHER if targets is None else WITH_TEACHER
        head = self.student.head
        with phase("heads and loss"):
            if batch.alignment is not None:
                assert targets is None or isinstance(targets, HiddenTargets)
                return aligned_distillation_loss(
                    rows,
                    head,
                    batch.labels,
                    targets,
                    batch.alignment,
                    self.loss if self.training else ACROSS,
                    self.vocabulary,
                    shared=self.across.shared,
                    label_metrics=self.label_metrics or not self.training,
                )
            return fused_distillation_loss(
                rows,
                head.weight,
                batch.labels,
                targets,
                loss,
                bias=head.bias,
                scale=head.scale,
                softcap=head.softcap,
                vocab_limit=self.vocabulary.limit,
                excluded=self.vocabulary.excluded(rows.device),
                label_metrics=self.label_metrics,
            )
