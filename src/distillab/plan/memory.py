"""一步训练要多少内存与多少次浮点运算：全由形状算出，不加载模型，不导入 torch。

只算张量；CUDA context、库自己的缓冲区，与分配器留着不还的（CPU 上 malloc 的堆）不在内。
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config.schema import ACROSS
from ..limits import (
    MANY_ROWS,
    MANY_STEPS,
    ROWS_TOGETHER,
    cache_room,
    rows_together,
    sampling_row_bytes,
)
from ..loss.chunking import PAIR_BYTES, Chunking, budget_bytes
from .shapes import BYTES, Shape

ZERO_BUCKET = 500_000_000
"""DeepSpeed 归约梯度的桶缺省有这么多个数。"""


@dataclass(frozen=True)
class Sampling:
    """一次 rollout 里一起采样的那些行。

    Attributes:
        rows: 几条一起；CPU 上至多 ``limits.ROWS_TOGETHER``，GPU 上看显存。
        prompt: 最长的 prompt，token。
        new_tokens: 每条最多生成几个 token。
    """

    rows: int
    prompt: int
    new_tokens: int

    @property
    def room(self) -> int:
        """CPU 上一行的 KV cache 能放几个 token：放满了才另取更大的。"""
        room = cache_room(self.prompt)
        while room < self.prompt + self.new_tokens:
            room = cache_room(room + 1)
        return room


@dataclass(frozen=True)
class Step:
    """一步训练里，一个进程上的一个 micro-batch。

    Attributes:
        student: 学生，参数为 float32（LoRA 的基座除外）。
        teacher: 教师；``None`` 是没有。
        batch_size: 几条序列。
        seq_len: 学生读的每条序列的 token 数 T。
        teacher_seq_len: 教师读的；缺省与 ``seq_len`` 相同。
        rows: response token 数 P；缺省是学生的全部 token。
        padded: 各条不一样长，注意力要 mask。
        accumulation: 一个 optimizer 步有几个 micro-batch。
        distils: 训练时用到教师，即 ``alpha > 0``；否则它只占权重，验证才用。
        divergence: 在 ``ACROSS`` 之中的，两个模型的词表可以不同，各走各的块。
        precision: 学生的计算精度。
        teacher_precision: 教师权重与计算的精度。
        checkpointing: 反向时重算各层。
        lora_rank: 只训练秩为 r 的 adapter；基座不再有梯度，也可以是半精度。
        base_precision: LoRA 时基座的精度。
        self_teacher: 教师就是关掉 adapter 的学生，没有第二份权重。
        engine: ``ddp``、``fsdp2``、``zero2``、``zero3``；只有一个进程时不看。
        processes: 进程数。
        shard_teacher: 教师的权重也分到各进程。
        sampling: 从学生采样；``None`` 是不采样。
        device_memory: 设备的内存，字节：损失的块多大由它定。
    """

    student: Shape
    teacher: Shape | None
    batch_size: int
    seq_len: int
    teacher_seq_len: int | None = None
    rows: int | None = None
    padded: bool = False
    accumulation: int = 1
    distils: bool = True
    divergence: str = "forward_kl"
    precision: str = "fp32"
    teacher_precision: str = "fp32"
    checkpointing: bool = False
    lora_rank: int | None = None
    base_precision: str = "fp32"
    self_teacher: bool = False
    engine: str = "ddp"
    processes: int = 1
    shard_teacher: bool = False
    sampling: Sampling | None = None
    device_memory: int = 80 * 2**30

    @property
    def tokens(self) -> int:
        """学生读的 token 数，``B * T``。"""
        return self.batch_size * self.seq_len

    @property
    def teacher_tokens(self) -> int:
        """教师读的 token 数。"""
        return self.batch_size * (self.teacher_seq_len or self.seq_len)

    @property
    def response_rows(self) -> int:
        """算损失的 response token 数 P。"""
        return self.rows or self.tokens

    @property
    def trained(self) -> int:
        """训练的参数个数；LoRA 时是全部线性层上的 adapter。"""
        if self.lora_rank is None:
            return self.student.parameters
        student = self.student
        qkvo = 4 * student.hidden_size + 2 * (student.query_size + student.kv_size)
        gates = 3 * (student.hidden_size + student.intermediate_size)
        return self.lora_rank * (qkvo + gates) * student.num_layers

    def _shards(self, *engines: str) -> int:
        """``engines`` 把某一样东西分到全部进程；别的引擎不分。"""
        return self.processes if self.engine in engines else 1

    def _kept(self) -> dict[str, int]:
        """从头到尾都在的：权重与 optimizer 状态，以及引擎自己的。"""
        student, trained, several = self.student, self.trained, self.processes > 1
        compute = BYTES[self.precision]
        zero = several and self.engine in ("zero2", "zero3")
        weights = trained * (compute if zero else 4)
        if self.lora_rank is not None:
            weights += student.parameters * BYTES[self.base_precision]
        weights //= self._shards("fsdp2", "zero3")
        if zero:  # DeepSpeed 以计算精度存权重，optimizer 另有一份分片的 float32
            weights += trained * 4 // self.processes
        found = {
            "student weights": weights,
            "optimizer": trained * 8 // self._shards("fsdp2", "zero2", "zero3"),
        }
        if self.teacher is not None and not self.self_teacher:
            shards = self.processes if self.shard_teacher else 1
            size = BYTES[self.teacher_precision]
            found["teacher weights"] = self.teacher.parameters * size // shards
        if several and self.engine == "ddp":
            found["communication"] = trained * 4  # 桶，与梯度一样大
        elif several and self.engine == "zero2":
            found["communication"] = min(trained, ZERO_BUCKET) * compute
        elif several:  # 正在用的与预取的两层；head 与 embedding 用到损失算完
            ends = student.head_parameters * (1 if student.tied else 2)
            found["communication"] = (2 * student.block_matmuls + ends) * compute
        return found

    def moments(self, device: str = "cuda") -> dict[str, dict[str, int]]:
        """一步里可能是峰值的各个时刻，那一刻每一部分占多少。

        Args:
            device: ``cpu`` 或 ``cuda``：损失的缓冲区与采样的权重因设备而异。

        Returns:
            时刻 -> 部分 -> 字节；时刻依次是 ``sampling``（有采样时）、``teacher``（用到教师时）、
            ``loss``、``backward``、``embedding``。
        """
        student, full = self.student, self.lora_rank is None
        size = BYTES[self.precision]
        sharded = self._shards("fsdp2", "zero2", "zero3")
        gradients = self.trained * 4 // sharded
        held = gradients if self.accumulation > 1 else 0  # 之前的 micro-batch 留下的
        head = student.head_parameters * 4 * full
        kept = self._kept()
        targets = {}
        found: dict[str, dict[str, int]] = {}
        if self.sampling is not None:
            found["sampling"] = kept | {"sampling": self._sampling(device)}
        if self.distils and self.teacher is not None:
            found["teacher"] = kept | {"gradients": held, "teacher forward": self._teacher()}
            width = self.teacher.hidden_size * BYTES[self.teacher_precision]
            targets = {"teacher forward": self.response_rows * width}

        layer = self.tokens * student.activations(
            self.precision, self.seq_len, padded=self.padded, lora_rank=self.lora_rank
        )
        ends = self.tokens * student.hidden_size * (4 + 4 * full)  # 最后的 norm
        stream = BYTES[self.base_precision]  # 残差流与权重同类型
        inputs = self.tokens * student.hidden_size * stream
        layers = student.num_layers * (inputs if self.checkpointing else layer) + ends
        cast = {}
        if self.precision != self.base_precision and (self.processes == 1 or self.engine == "ddp"):
            # 前向里每个权重的半精度副本，反向还要用
            cast = {"autocast weights": student.num_layers * student.block_matmuls * size}
        rows = self.response_rows * student.hidden_size * 4
        buffers = self.loss_buffers(device) + 2 * rows  # hidden state 与它的梯度
        so_far = kept | targets | {"gradients": held + head}
        found["loss"] = so_far | cast | {"student activations": layers, "loss": buffers}
        # 反向走到最后一层：它的激活值还在（重算的话此刻才有），又有 gate、up 与残差流的梯度。
        wide = 2 * student.intermediate_size + 2 * student.hidden_size
        working = self.tokens * (wide * size + student.hidden_size * 4)
        working += layer * self.checkpointing
        cast = {} if self.checkpointing else cast
        found["backward"] = so_far | cast | {"student activations": layers + working}
        # 走完各层：embedding 的梯度先单独算出，再与 head 的相加；已有的梯度要等它们都齐了才加上去。
        apart = student.tied + (held > 0 or sharded > 1)
        gradients += apart * head
        found["embedding"] = so_far | {"gradients": gradients, "student activations": working}
        return found

    def with_sampling(
        self, count: int, prompt: int, new_tokens: int, device: str, memory: int
    ) -> Step:
        """加上采样：``count`` 条分几次采，GPU 上由 ``memory`` 字节里还空着的决定。"""
        if device == "cpu":
            rows = min(count, ROWS_TOGETHER)
        else:
            free = max(0, memory - sum(self._kept().values()))
            rows = rows_together(count, self._sampling_row(prompt, new_tokens), free)
        return replace(self, sampling=Sampling(rows, prompt, new_tokens))

    def peak(self, device: str = "cuda") -> tuple[str, dict[str, int]]:
        """占得最多的时刻，与那一刻的各部分，单位字节；总和就是一个进程的峰值。"""
        moments = self.moments(device)
        name = max(moments, key=lambda moment: sum(moments[moment].values()))
        return name, moments[name]

    def memory(self, device: str = "cuda") -> dict[str, int]:
        """各部分自己的峰值，单位字节；它们不在同一刻，总和因而高于 ``peak``。"""
        found: dict[str, int] = {}
        for parts in self.moments(device).values():
            for part, size in parts.items():
                found[part] = max(found.get(part, 0), size)
        return found

    def loss_buffers(self, device: str) -> int:
        """损失分块的缓冲区，字节。"""
        across, vocab = self.divergence in ACROSS, self.student.vocab_size
        two = self.distils and self.teacher is not None and not across
        if across and self.teacher is not None:
            vocab = max(vocab, self.teacher.vocab_size)
        half = device == "cuda" and self.precision != "fp32"
        budget = budget_bytes(device, self.device_memory, kernels=half)
        chunking = Chunking.of(
            self.response_rows,
            vocab,
            4 * (1 + two),
            2 * half,
            device,
            budget,
            half,
        )
        weight = 2 * self.student.head_parameters * half * (self.base_precision == "fp32")
        pairs = self.response_rows * PAIR_BYTES * vocab * (across and self.divergence != "alm")
        buffers = max(chunking.buffer_bytes, min(budget, pairs))
        return buffers + weight  # 半精度的 head 只在损失里有一份

    def _teacher(self) -> int:
        """教师前向里最宽的一刻：gate、silu(gate)、up，与几份 hidden state。"""
        assert self.teacher is not None
        size = BYTES[self.teacher_precision]
        hidden, wide = self.teacher.hidden_size, self.teacher.intermediate_size
        kept = self.response_rows * hidden * size
        mask = self.batch_size * (self.teacher_seq_len or self.seq_len) ** 2 * size * self.padded
        scores = self.teacher.scores(self.teacher_seq_len or self.seq_len, size)
        return self.teacher_tokens * ((3 * hidden + 3 * wide) * size + scores) + kept + mask

    def _sampling(self, device: str) -> int:
        """KV cache，换成采样用的一份权重，与最后一个位置的 logits。"""
        assert self.sampling is not None
        student, sampling = self.student, self.sampling
        size = BYTES[self.sampling_precision]
        layers = student.num_layers * student.block_matmuls
        cuda, half = device == "cuda", size < BYTES[self.base_precision]
        by_column = not cuda and sampling.rows >= MANY_ROWS and size == 4
        weights = 0
        if self._shards("fsdp2", "zero3") > 1:  # 分片的学生收成完整的一份，整次采样都用它
            weights = self.sampling_weights
        elif half or (
            size == 4
            and sampling.new_tokens >= MANY_STEPS
            and (by_column or self.lora_rank is not None)
        ):
            weights = layers * size + student.head_parameters * 4 * by_column
        if cuda:
            weights += student.head_parameters * size * half
            row = self._sampling_row(sampling.prompt, sampling.new_tokens)
            return sampling.rows * row + weights
        cache = self._kv_bytes * sampling.rows * sampling.room
        return cache + weights + 4 * sampling.rows * student.vocab_size * 4

    @property
    def _kv_bytes(self) -> int:
        """采样时一个 token 的键值，字节。"""
        student = self.student
        return 2 * student.kv_size * student.num_layers * BYTES[self.sampling_precision]

    def _sampling_row(self, prompt: int, new_tokens: int) -> int:
        student = self.student
        wide = 3 * (student.hidden_size + student.intermediate_size)
        return sampling_row_bytes(
            prompt,
            new_tokens,
            kv_bytes=self._kv_bytes,
            wide_bytes=wide * BYTES[self.sampling_precision],
            vocab_size=student.vocab_size,
        )

    @property
    def sampling_precision(self) -> str:
        """采样时 KV cache 与各层权重的精度：autocast 里是半精度，半精度的基座总是。"""
        return min(self.precision, self.base_precision, key=BYTES.__getitem__)

    @property
    def sampling_weights(self) -> int:
        """采样时一份完整的学生，字节：各层如 ``sampling_precision``，其余与存放的相同。"""
        layers = self.student.num_layers * self.student.block_matmuls
        rest = self.student.parameters - layers
        return layers * BYTES[self.sampling_precision] + rest * BYTES[self.base_precision]

    def operations(self) -> dict[str, float]:
        """一个 micro-batch 的浮点运算次数（乘与加各算一次）。

        矩阵乘：前向每个参数每个 token 2 次，反向 4 次（冻结的权重 2 次）；因果注意力只算下三角。

        Returns:
            ``student``、``teacher`` 两个模型体，``heads``，与采样时的 ``sampling``。
        """
        rows, length = self.response_rows, self.seq_len
        backward = 2 if self.lora_rank is None else 1
        passes = 1 + backward + self.checkpointing
        found = {
            "student": self.student.forward_operations(self.tokens, length) * passes,
            "heads": 2.0
            * rows
            * self.student.head_parameters
            * (1 + backward + (self.divergence in ACROSS)),
        }
        if self.teacher is not None and self.distils:
            read = self.teacher_seq_len or length
            found["teacher"] = self.teacher.forward_operations(self.teacher_tokens, read)
            found["heads"] += 2.0 * rows * self.teacher.head_parameters
        if self.sampling is not None:
            total = self.sampling.prompt + self.sampling.new_tokens
            found["sampling"] = self.student.forward_operations(self.batch_size * total, total)
            found["sampling"] += (
                2.0 * self.batch_size * self.sampling.new_tokens * self.student.head_parameters
            )
        return found
