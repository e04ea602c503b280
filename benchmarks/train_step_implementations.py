"""``train_step.py`` 测的东西：两组模型、同一批 token，以及三家各自的训练循环。

权重是随机的：速度与权重的值无关，这样不必下载任何东西。同一个 ``Cell`` 在每个进程里造出的教师、
学生与 token 都相同：学生是 ``StudentModel``，别家用转换过去的 ``Qwen2ForCausalLM``。
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from train_step_clock import Clock

if TYPE_CHECKING:
    from distillab.models.student import StudentModel

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


@dataclass(frozen=True)
class Cell:
    """一格：同样的模型、token 与目标函数，所有实现都在它上面测。

    Attributes:
        case: ``a`` 或 ``b``，见 ``SHAPES``。
        scale: ``full``；``tiny`` 只供试运行。
        batch_size: 每步的序列数。
        seq_len: 每条序列的 token 数；第一个没有预测它的位置，所以训练的少一个。
        precision: ``fp32``；``bf16`` 是学生 float32 加 autocast，教师本身就是 bfloat16。
        alpha: 蒸馏损失的份额；``trl`` 表达不了，它总是 1。
        device: ``cpu`` 或 ``cuda``。
        seed: 权重与 token 的种子。
    """

    case: str
    scale: str
    batch_size: int
    seq_len: int
    precision: Literal["fp32", "bf16"]
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


# 模型与 token。

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
    """教师与学生，都在 CPU 上；``bf16`` 时教师转成 bfloat16，学生总是 float32。"""
    from distillab.config.schema import ModelConfig
    from distillab.export.convert import student_from_teacher
    from distillab.models.student import StudentModel

    teacher = make_teacher(cell)
    shape = SHAPES[cell.case, cell.scale]["student"]
    if isinstance(shape, int):
        student = student_from_teacher(teacher, shape)
    else:
        sizes = dict(zip(STUDENT_NAMES, shape, strict=True))
        student = StudentModel(ModelConfig(**sizes, max_seq_len=max(512, cell.seq_len)))
    return teacher.to(torch.bfloat16) if cell.precision == "bf16" else teacher, student


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


# 三家的训练循环，到 clock.stop 返回 False 为止。


def distillab_loop(cell: Cell, clock: Clock, compiled: bool = False) -> None:
    """``DistillationTrainer``：``alpha * KL(教师||学生) + (1 - alpha) * CE``，按 token 平均。

    每步就是 ``_step``，连同它自己的等待与记账。
    """
    from distillab.batch import collate_text
    from distillab.config.schema import LossConfig, TrainingConfig
    from distillab.models.interface import PretrainedLM
    from distillab.teachers.in_process import LocalTeacher
    from distillab.train.on_policy import Prepared
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
        compile=compiled,
    )
    loss = LossConfig(divergence="forward_kl", alpha=cell.alpha, temperature=1.0)
    local = LocalTeacher(PretrainedLM(teacher))
    with tempfile.TemporaryDirectory() as directory:
        trainer = DistillationTrainer(student, local, data, data, config, directory, loss=loss)
        clock.watch(local.model, "forward", "teacher body")
        clock.watch(student, "forward", "student body forward")
        clock.watch(trainer.module, "forward", "loss: heads, values, gradients")
        clock.watch(trainer.accelerator, "backward", "student body backward")
        clock.watch(trainer.accelerator, "clip_grad_norm_", "gradient clip")
        clock.watch(trainer.optimizer, "step", "optimizer step")
        window = Prepared([collate_text(data).to(cell.device)])
        more = True
        while more:
            clock.start()
            sums = trainer._step(window)
            mean = {name: sums[name] / sums["tokens"] for name in ("loss", "divergence")}
            more = clock.stop(**mean)


def compiled_loop(cell: Cell, clock: Clock) -> None:
    """同上，``train.compile: true``；编译在热身的两步里，不计时。"""
    distillab_loop(cell, clock, compiled=True)


def trl_loop(cell: Cell, clock: Clock, checkpointing: bool = False) -> None:
    """TRL 的 ``GKDTrainer.train()``：``KL(教师||学生)``，按 token 平均；没有交叉熵。

    ``lmbda=0``：只用给定的 token，不生成；``beta=0``：KL(教师||学生)。它的 ``temperature`` 只管
    生成，``compute_loss`` 不看，散度总是 T = 1。batch 的键就是它的 collator 给的、``compute_loss``
    读的那些。其余是 ``GKDConfig`` 的缺省，唯有激活重算见 ``trl_defaults_loop``。一步从
    ``on_step_begin`` 到 ``on_step_end``：取数据不计，计数、nan 检查、回调都计。
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = trainer.last_loss
            control.should_training_stop = not clock.stop(loss=loss, divergence=loss)

    class Recording(GKDTrainer):
        """记下损失；它的日志在 ``on_step_end`` 之后，来不及。"""

        last_loss: Any = None

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": batch, "attention_mask": batch.new_ones(batch.shape), "labels": batch}

    teacher, student = make_peer_models(cell)
    vocabulary = models.WordLevel({"<eos>": 0}, unk_token="<eos>")  # 它要一个 tokenizer，但用不上
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary), eos_token="<eos>", pad_token="<eos>"
    )
    with tempfile.TemporaryDirectory() as directory:
        config = GKDConfig(
            output_dir=directory,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=cell.batch_size,
            learning_rate=LEARNING_RATE,
            max_grad_norm=GRADIENT_CLIP,
            bf16=cell.precision == "bf16",  # 缺省是 True，CPU 上也是
            use_cpu=cell.device == "cpu",
            max_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=cell.seed,
        )
        trainer = Recording(
            student,
            teacher,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": make_tokens(cell).tolist()}),
            processing_class=tokenizer,
            callbacks=[Timed()],
        )
        trainer.train()


def trl_defaults_loop(cell: Cell, clock: Clock) -> None:
    """同上，不动 ``gradient_checkpointing`` 的缺省值 True：慢而省内存。"""
    trl_loop(cell, clock, checkpointing=True)


def plain_loop(cell: Cell, clock: Clock) -> None:
    """第一个脚本的写法：两份完整的 logits；算的与 ``distillab`` 相同。"""
    teacher, student = make_peer_models(cell)
    teacher, student = teacher.to(cell.device), student.to(cell.device).train()
    input_ids = make_tokens(cell).to(cell.device)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    alpha, temperature = cell.alpha, 1.0
    bf16 = cell.precision == "bf16"

    def train_step() -> tuple[Tensor, Tensor]:
        with torch.autocast(cell.device, dtype=torch.bfloat16, enabled=bf16):
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
    "plain": plain_loop,
}
IMPLEMENTATIONS = list(LOOPS)
PEERS = {"trl": "trl", "trl-defaults": "trl", "plain": "transformers"}
"""不是本项目的实现，以及它的发行包。"""


def factor_to_mean(implementation: str) -> float:
    """损失乘上它之后是每个有目标的 token 的平均；目前各家都已经是。

    TRL 除以 ``num_items_in_batch``：Trainer 数的是移位之后的标签，共 ``B * (T - 1)`` 个，而不是
    ``B * T`` 个。与 ``distillab`` 的散度不符时，``train_step.py`` 会警告。
    """
    return 1.0
