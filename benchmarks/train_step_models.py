"""``train_step.py`` 的两组模型与 token。

权重是随机的：速度与权重的值无关，这样不必下载任何东西。同一个 ``Cell`` 在每个进程里造出的教师、
学生与 token 都相同：学生是 ``StudentModel``，别家用转换过去的 ``Qwen2ForCausalLM``。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distillab.models.student import StudentModel


@dataclass(frozen=True)
class Cell:
    """一格：同样的模型、token 与目标函数，所有实现都在它上面测。

    Attributes:
        case: ``a`` 或 ``b``，见 ``SHAPES``。
        scale: ``full``；``tiny`` 只供试运行。
        batch_size: 每步的序列数。
        seq_len: 每条序列的 token 数；第一个没有预测它的位置，所以训练的少一个。
        precision: ``fp32``；``bf16`` 与 ``fp16`` 是学生 float32 加 autocast，教师本身就是半精度。
        alpha: 蒸馏损失的份额；``trl`` 表达不了，它总是 1。
        device: ``cpu`` 或 ``cuda``。
        seed: 权重与 token 的种子。
    """

    case: str
    scale: str
    batch_size: int
    seq_len: int
    precision: Literal["fp32", "bf16", "fp16"]
    alpha: float
    device: str
    seed: int

    @property
    def trained_tokens(self) -> int:
        """一步里有目标的位置数。"""
        return self.batch_size * (self.seq_len - 1)

    def __str__(self) -> str:
        size = f"{self.batch_size} x {self.seq_len} tokens"
        return f"case {self.case}{' tiny' * (self.scale == 'tiny')}, {size}, {self.precision}"


SHAPES: dict[tuple[str, str], dict[str, Any]] = {
    # SmolLM2-135M 的结构；学生是其中均匀挑出的 15 层。
    ("a", "full"): {
        "teacher": (576, 30, 9, 3, 1536, 49152),
        "student": 15,
        "size": {"cpu": (4, 256), "cuda": (4, 256)},
    },
    # Qwen2.5-0.5B 的结构；学生是 ModelConfig 的缺省，123M 个参数。
    ("b", "full"): {
        "teacher": (896, 24, 14, 2, 4864, 151936),
        "student": (512, 12, 8, 2, 2048, 151936),
        "size": {"cpu": (1, 512), "cuda": (8, 512)},
    },
    ("a", "tiny"): {
        "teacher": (48, 4, 3, 1, 96, 512),
        "student": 2,
        "size": {"cpu": (2, 32), "cuda": (2, 32)},
    },
    ("b", "tiny"): {
        "teacher": (64, 3, 4, 2, 128, 768),
        "student": (32, 2, 4, 2, 64, 768),
        "size": {"cpu": (1, 48), "cuda": (4, 48)},
    },
}
"""``teacher`` 与 ``student``：hidden、层数、查询头、键值头、FFN 宽度、词表；``size``：B 与 T。"""

NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
STUDENT_NAMES = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
)


def make_teacher(cell: Cell) -> Any:
    """随机权重的教师，eval；case a 是 Llama，case b 是 Qwen2，词表都与输入绑定。"""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(cell.seed)
    shape = dict(zip(NAMES, SHAPES[cell.case, cell.scale]["teacher"], strict=True))
    length = {"max_position_embeddings": max(8192, cell.seq_len), "tie_word_embeddings": True}
    if cell.case == "a":
        rope = {"rope_type": "default", "rope_theta": 1e5}
        llama = LlamaConfig(**shape, **length, rms_norm_eps=1e-5, rope_parameters=rope)
        return LlamaForCausalLM(llama).eval()
    rope = {"rope_type": "default", "rope_theta": 1e6}
    qwen2 = Qwen2Config(**shape, **length, rms_norm_eps=1e-6, rope_parameters=rope)
    return Qwen2ForCausalLM(qwen2).eval()


def make_models(cell: Cell) -> tuple[Any, StudentModel]:
    """教师与学生，都在 CPU 上；教师转成 ``precision``，学生总是 float32。"""
    from distillab.config.model_sections import ModelConfig
    from distillab.distributed.engine import DTYPES
    from distillab.export.convert import student_from_teacher
    from distillab.models.student import StudentModel

    teacher = make_teacher(cell)
    shape = SHAPES[cell.case, cell.scale]["student"]
    if isinstance(shape, int):
        student = student_from_teacher(teacher, shape)
    else:
        sizes = dict(zip(STUDENT_NAMES, shape, strict=True))
        student = StudentModel(ModelConfig(**sizes, max_seq_len=max(512, cell.seq_len)))
    return teacher.to(DTYPES[cell.precision]), student


def make_peer_models(cell: Cell) -> tuple[Any, Any]:
    """同 ``make_models``，学生是 logits 相同的 ``Qwen2ForCausalLM``，float32。"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from distillab.export.convert import to_hf_state_dict

    teacher, own = make_models(cell)
    ours = own.config
    config = Qwen2Config(
        **{theirs: getattr(ours, name) for theirs, name in zip(NAMES, STUDENT_NAMES, strict=True)},
        max_position_embeddings=ours.max_seq_len,
        tie_word_embeddings=True,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
    )
    student = Qwen2ForCausalLM(config)
    missing, unexpected = student.load_state_dict(to_hf_state_dict(own), strict=False)
    assert missing == ["lm_head.weight"], missing  # 与 Embedding 绑定
    assert not unexpected, unexpected
    return teacher, student


def make_tokens(cell: Cell) -> Tensor:
    """``[B, T]``，每一步都是这一批。"""
    generator = torch.Generator().manual_seed(cell.seed)
    vocab = SHAPES[cell.case, cell.scale]["teacher"][-1]
    return torch.randint(vocab, (cell.batch_size, cell.seq_len), generator=generator)
