"""配置的数据类型：``TrainingConfig`` 与 ``Recipe``。

这里只说「什么是合法的配置」，与模型有关的几节在 ``model_sections.py``，与数据有关的在
``sections.py``；从 YAML 读入、``extends``、
``--set`` 与报错的措辞在 ``recipes.py``。本模块不导入 torch。
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .mixture import Data, keyed
from .model_sections import CacheConfig, StudentSection, TeacherSection
from .sections import (
    FileName,
    InsideRun,
    LmEvalConfig,
    ResponsesConfig,
    SamplingConfig,
    Section,
    SynthesizeConfig,
    TaskConfig,
    TextConfig,
)

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "alm",
    "projected_kl",
    "uld",
    "gold",
]
ACROSS = ("alm", "projected_kl", "uld", "gold")
"""对同样的文字逐段比较的：两个模型的分词器可以不同。"""
Precision = Literal["auto", "fp32", "bf16", "fp16"]


ALIASES = {"alpha", "temperature"}
"""目标函数的这两个参数，``train`` 里也可以写；它们的家是 ``loss``。"""


class TrainingConfig(Section):
    """训练超参数。

    ``alpha`` 与 ``temperature`` 是目标函数的参数：在配方里写 ``loss.alpha`` 或 ``train.alpha``
    都可以，读入后两处相同，互相矛盾则拒绝。
    """

    batch_size: int = Field(8, gt=0, description="Sequences per micro-batch and process.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Not applied to norms and biases.")
    warmup_steps: int = Field(500, ge=0, description="Optimizer steps of linear warm-up.")
    num_epochs: int = Field(3, gt=0, description="Passes over the training data.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the distillation loss.")
    temperature: float = Field(2.0, gt=0, description="Temperature of the distillation loss.")
    checkpoint_dir: InsideRun = Field(
        "checkpoints/", min_length=1, description="Inside the run directory, relative to it."
    )
    log_interval: int = Field(50, gt=0, description="Optimizer steps between metrics rows.")
    eval_interval: int = Field(500, gt=0, description="Optimizer steps between validations.")
    save_interval: int = Field(1000, gt=0, description="Optimizer steps between checkpoints.")

    min_learning_rate: float = Field(1e-5, ge=0, description="Floor that the schedule ends at.")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Warm-up as a share of all steps, instead of warmup_steps."
    )
    betas: tuple[float, float] = Field(  # YAML 只有列表
        (0.9, 0.999), strict=False, description="AdamW moment decay rates."
    )
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches per step.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps.")
    precision: Precision = Field(
        "fp32", description="fp32, bf16 autocast, fp16 + loss scaling, or auto: the fastest here."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds initialisation, data order, dropout.")
    activation_checkpointing: bool = Field(False, description="Recompute blocks in backward.")
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile the blocks, with CUDA graphs; auto: where it pays."
    )
    max_checkpoints: int = Field(2, gt=0, description="Newest checkpoints kept besides 'best'.")
    timeout_minutes: float = Field(
        30.0, gt=0, description="Longest that one process waits for the others before all end."
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="Trackers fed besides metrics.jsonl."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate:g} is above "
                f"learning_rate={self.learning_rate:g}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self


class LossConfig(Section):
    """目标函数：``alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE``，对每个 response token。"""

    divergence: Divergence = Field("forward_kl", description="D between teacher and student.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of D; 0 is plain cross-entropy.")
    temperature: float = Field(2.0, gt=0, description="T that softens both distributions in D.")
    beta: float | None = Field(None, description="Weight of the teacher in jsd; default 0.5.")
    skew: float | None = Field(None, description="s of skew_forward_kl and skew_reverse_kl.")
    tau: float | None = Field(
        None, description="Softens the likelihoods that alm compares; default 100."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the hard label spread over the vocabulary."
    )

    @model_validator(mode="after")
    def _parameter_fits(self) -> LossConfig:
        if self.divergence == "jsd":
            self.beta = 0.5 if self.beta is None else self.beta
            if self.beta in (0, 1):
                meant = "reverse_kl" if self.beta else "forward_kl"
                raise ValueError(
                    f"beta={self.beta:g} is not a jsd (its value is 0 everywhere): "
                    f"use divergence {meant}"
                )
            if not 0 < self.beta < 1:
                raise ValueError(f"beta={self.beta:g} must lie strictly between 0 and 1")
        elif self.beta is not None:
            raise ValueError(f"beta belongs to jsd, but divergence is {self.divergence}")
        if self.divergence.startswith("skew_"):
            self.skew = 0.1 if self.skew is None else self.skew
            if not 0 < self.skew < 1:
                raise ValueError(f"skew={self.skew:g} must lie strictly between 0 and 1")
        elif self.skew is not None:
            raise ValueError(
                f"skew belongs to skew_forward_kl and skew_reverse_kl, "
                f"but divergence is {self.divergence}"
            )
        if self.divergence == "alm":
            self.tau = 100.0 if self.tau is None else self.tau
            if self.tau < 1:
                raise ValueError(f"tau={self.tau:g} must be at least 1")
        elif self.tau is not None:
            raise ValueError(f"tau belongs to alm, but divergence is {self.divergence}")
        if self.across:
            if "temperature" not in self.model_fields_set:
                self.temperature = 1.0
            for key, neutral in (("temperature", 1), ("label_smoothing", 0)):
                if (value := getattr(self, key)) != neutral:
                    raise ValueError(
                        f"{key}={value:g} and divergence={self.divergence} disagree: it compares "
                        f"likelihoods of text; set {key} to {neutral}"
                    )
        return self

    @property
    def across(self) -> bool:
        """是不是对同样的文字逐段比较的：教师用它自己的分词器。"""
        return self.divergence in ACROSS


class EvaluateConfig(Section):
    """验证、样例，与训练前后各考一次的任务。"""

    batch_size: int = Field(8, gt=0, description="Sequences per forward pass.")
    max_sequences: int | None = Field(
        None, gt=0, description="Validation sequences used; default: all."
    )
    prompts: list[str] = Field([], description="Continued by the student when training ends.")
    max_new_tokens: int = Field(64, gt=0, description="Tokens generated for each prompt.")
    tasks: dict[FileName, TaskConfig] = Field(
        {}, description="Checked by a program, before and after training."
    )
    texts: dict[FileName, TextConfig] = Field(
        {}, description="Perplexity on these, before and after training."
    )
    lm_eval: LmEvalConfig | None = Field(
        None, description="Tasks of lm-evaluation-harness, measured by `distillab evaluate`."
    )


class Recipe(Section):
    """一次训练的全部选择；运行目录里保存的是它解析后的样子。"""

    name: FileName = Field(description="Names the run directory runs/NAME.")
    description: str = Field("", description="One line for `distillab recipes`.")
    student: StudentSection = StudentSection()
    teacher: TeacherSection | None = None
    data: Data
    responses: ResponsesConfig = ResponsesConfig()
    sampling: SamplingConfig = SamplingConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    loss: LossConfig = LossConfig()
    train: TrainingConfig = TrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_objective(cls, raw: Any) -> Any:
        """``train.alpha`` 只是 ``loss.alpha`` 的另一种写法，``temperature`` 同理。"""
        if not isinstance(raw, dict):
            return raw
        loss, train = raw.get("loss", {}), raw.get("train", {})
        if not isinstance(loss, dict) or not isinstance(train, dict):
            return raw
        loss, train = dict(loss), dict(train)
        for key in sorted(ALIASES & train.keys()):
            given = train.pop(key)
            if loss.setdefault(key, given) != given:
                raise ValueError(f"loss.{key}={loss[key]} and train.{key}={given} disagree")
        return {**raw, "loss": loss, "train": train}

    @model_validator(mode="after")
    def _same_in_train(self) -> Recipe:
        same = {key: getattr(self.loss, key) for key in ALIASES}
        self.train = self.train.model_copy(update=same)
        return self

    def values(self) -> dict[str, Any]:
        """可以再读、再被 ``--set`` 覆盖的值：没有别名，每个数只写一处。"""
        values = self.model_dump(mode="json", by_alias=True, exclude={"train": ALIASES})
        config = self.student.config
        if self.student.vocab and config and "vocab_size" not in config.model_fields_set:
            del values["student"]["config"]["vocab_size"]  # 裁剪出多少就是多少
        return values

    @model_validator(mode="after")
    def _choices_agree(self) -> Recipe:
        """说不通的组合。"""
        share, data = self.responses.student_fraction, self.data
        if self.responses.on_policy and data.chat is None:
            raise ValueError(
                f"responses.student_fraction={share:g} and data.format=text disagree: "
                f"only chat data has prompts to sample from"
            )
        if self.responses.on_policy and self.loss.alpha < 1:
            raise ValueError(
                f"responses.student_fraction={share:g} and loss.alpha={self.loss.alpha:g} "
                f"disagree: a sampled response is no label; set loss.alpha to 1"
            )
        if self.teacher is None:
            if self.loss.alpha > 0:
                raise ValueError(
                    f"loss.alpha={self.loss.alpha:g} needs a teacher: "
                    f"set teacher.path, or loss.alpha to 0"
                )
            init = self.student.init
            if init is not None and init.source == "teacher":
                raise ValueError("student.init.from=teacher needs teacher.path")
            if self.student.vocab is not None and self.student.vocab.outside == "bucket":
                raise ValueError(
                    "student.vocab.outside=bucket needs teacher.path: it says where the teacher's "
                    "probability goes"
                )
            if self.student.path is None and self.student.tokenizer is None and init is None:
                raise ValueError("without a teacher or student.path, set student.tokenizer")
        if self.loss.across:
            self._across_tokenizers()
        if self.teacher is not None and self.teacher.cache is not None:
            self._cached(self.teacher.cache)
        config = self.student.config
        for key, source in keyed(data):
            length = source.max_seq_len
            if config is not None and length is not None and length > config.max_seq_len:
                raise ValueError(
                    f"{key}.max_seq_len={length} is above student.config.max_seq_len="
                    f"{config.max_seq_len}"
                )
        total = self.train.max_steps
        key, first = keyed(data)[0]
        if first.streaming and total is None:
            raise ValueError(f"{key}.streaming=true needs train.max_steps: a stream has no end")
        warmup = self.train.warmup_steps if self.train.warmup_ratio is None else 0
        if total is not None and warmup >= total:
            raise ValueError(
                f"train.warmup_steps={self.train.warmup_steps} leaves nothing of "
                f"train.max_steps={total}"
            )
        return self

    def _cached(self, cache: CacheConfig) -> None:
        """存下的分布回答不了的。"""
        share, loss = self.responses.student_fraction, self.loss
        if self.responses.on_policy:
            raise ValueError(
                f"responses.student_fraction={share:g} and teacher.cache disagree: responses that "
                f"the student samples are new in every step; drop one"
            )
        if loss.alpha == 0:
            return
        if loss.across:
            raise ValueError(
                f"loss.divergence={loss.divergence} and teacher.cache disagree: the teacher's "
                f"tokens are not the student's; drop teacher.cache"
            )
        kept = f"teacher.cache.keep={cache.keep}"
        if cache.keep == "sampled" and loss.divergence != "forward_kl":
            raise ValueError(
                f"loss.divergence={loss.divergence} and {kept} disagree: draws give forward_kl; "
                f"set keep to top_k"
            )
        if cache.tail == "renormalise" and loss.divergence == "reverse_kl":
            raise ValueError(
                "loss.divergence=reverse_kl and teacher.cache.tail=renormalise disagree: it is "
                "infinite where the teacher's probability is left out; set tail to bucket"
            )
        if cache.tail != "renormalise" and loss.temperature != 1:
            raise ValueError(
                f"loss.temperature={loss.temperature:g} and {kept} disagree: the rest of the "
                f"distribution is known at temperature 1; set loss.temperature to 1"
                + (", or tail to renormalise" if cache.keep == "top_k" else "")
            )

    def _across_tokenizers(self) -> None:
        """分词器可以不同时，用不上的写法。"""
        objective = f"loss.divergence={self.loss.divergence}"
        init = self.student.init
        if init is not None and init.source == "teacher" and self.student.tokenizer is not None:
            raise ValueError(
                f"student.init and student.tokenizer disagree with {objective}: copied embeddings "
                f"are of the teacher's tokens; drop one"
            )
        if self.student.vocab is not None:
            raise ValueError(
                f"student.vocab and {objective} disagree: a trimmed vocabulary is the teacher's, "
                f"too; drop one"
            )
        for key, source in keyed(self.data):
            if source.packing and source.format == "text":
                raise ValueError(
                    f"{key}.packing and {objective} disagree: the articles of a chunk are not "
                    f"kept apart for two tokenizers; drop {key}.packing"
                )
