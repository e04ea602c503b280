"""``distillab plan``：一份配方在一种设备上要多少内存、多少时间，放不下时改什么。

全由配方、模型的配置与形状算出；不加载模型，不下载权重。只有本地的对话文件会读，为的是知道有几条、
最长的有多长。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ..config.schema import ModelConfig, ModelSource, Recipe, StudentSection, TrainingConfig
from ..data.conversations import Conversation
from ..data.pairs import load_pairs
from ..errors import DistillabError
from ..limits import ROWS_TOGETHER
from ..sources import fetch, parse_source
from .hardware import Device
from .memory import Sampling, Step
from .model_shapes import Planned, find_shape
from .shapes import Shape

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

BYTES_PER_TOKEN = 4.3
"""估计文本有多少 token：Qwen 的 tokenizer 读中文维基、SmolLM2 的读英文维基，都是 4.3 到 4.5。"""

SHORT_BYTES_PER_TOKEN, MESSAGE_TOKENS, SYSTEM_TOKENS = 3.0, 8, 24
"""估计一段对话有多少 token，往多里算：每 3 字节一个，每条消息外加模板的，模板还可能补上 system。"""


@dataclass(frozen=True)
class Lengths:
    """一条训练序列的长度，token。

    Attributes:
        student: 学生读的。
        teacher: 教师读的。
        rows: 其中的 response token。
        prompt: 采样时的 prompt。
        examples: 训练的条数；不知道是 ``None``。
    """

    student: int
    teacher: int
    rows: int
    prompt: int
    examples: int | None = None


@dataclass(frozen=True)
class Plan:
    """一份配方在一种设备上的打算。

    Attributes:
        recipe: 配方。
        step: 一个进程上的一个 micro-batch。
        device: 一个进程的那一份。
        steps: optimizer 步数；不读数据就不知道时是 ``None``。
        notes: 假定了什么，英文，一条一句。
    """

    recipe: Recipe
    step: Step
    device: Device
    steps: int | None
    notes: tuple[str, ...]

    @property
    def moment(self) -> str:
        """占得最多的时刻。"""
        return self.step.peak(self.device.kind)[0]

    @property
    def parts(self) -> dict[str, int]:
        """那一刻各部分的字节数，设备自己的开销在内。"""
        return self.step.peak(self.device.kind)[1] | {"overhead": self.device.overhead}

    @property
    def largest(self) -> dict[str, int]:
        """各部分自己的峰值，字节。"""
        return self.step.memory(self.device.kind) | {"overhead": self.device.overhead}

    @property
    def total(self) -> int:
        """一个进程的峰值，字节。"""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """放得下。"""
        return self.total <= self.device.memory

    @property
    def tokens(self) -> int:
        """一个 optimizer 步里学生读的 token，所有进程合计。"""
        return self.step.tokens * self.step.accumulation * self.step.processes

    @property
    def operations(self) -> dict[str, float]:
        """一个 optimizer 步里一个进程的浮点运算；采样按它发生的概率算。"""
        found = self.step.operations()
        if "sampling" in found:
            found["sampling"] *= self.sampled_share / self.recipe.responses.reuse
        return {name: value * self.step.accumulation for name, value in found.items()}

    @property
    def sampled_share(self) -> float:
        """多少步从学生采样，``[0, 1]``。"""
        responses = self.recipe.responses
        final = responses.final_student_fraction
        start = responses.student_fraction
        return start if final is None else (start + final) / 2

    @property
    def seconds(self) -> float:
        """一个 optimizer 步的秒数：矩阵乘按持续的算力，逐个 token 的采样按内存带宽，取慢的。"""
        device, found = self.device, self.operations
        rates = {part: device.flops[self._precision_of(part)] * device.efficiency for part in found}
        seconds = {part: count / rates[part] for part, count in found.items()}
        sampling = self.step.sampling
        if sampling is not None:
            groups = -(-self.step.batch_size * self.step.accumulation // sampling.rows)
            read = groups * sampling.new_tokens * self.step.sampling_weights
            share = self.sampled_share / self.recipe.responses.reuse
            seconds["sampling"] = max(seconds["sampling"], read / device.bandwidth * share)
        return sum(seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """所有进程合计，学生读的 token 每秒；没有算通信。"""
        return self.tokens / self.seconds

    def _precision_of(self, part: str) -> str:
        name = {"teacher": self.step.teacher_precision, "sampling": self.step.sampling_precision}
        precision = name.get(part, self.step.precision)
        return precision if precision in self.device.flops else "fp32"


def plan(recipe: Recipe, device: Device, processes: int = 1, engine: str | None = None) -> Plan:
    """算出一份配方的打算。

    Args:
        recipe: 配方。
        device: ``hardware.find_device`` 的返回值。
        processes: 进程数，每个 GPU 一个；CPU 由它们分。
        engine: ``ENGINES`` 之一；缺省 ``ddp``。

    Raises:
        DistillabError: 模型的配置读不到，或引擎不认识。
    """
    notes: list[str] = []
    models = _models(recipe.student, recipe.teacher)
    lengths = _lengths(recipe, models, notes)
    device = device.shared_by(processes)
    return _planned(recipe, models, lengths, device, processes, engine or "ddp", notes)


def suggestions(found: Plan) -> Iterator[tuple[str, Plan]]:
    """依次该改的，每一条在前面各条之上再改；总和不变小的略去。

    Args:
        found: 放不下的打算。

    Yields:
        ``(怎样改，命令行上的写法, 改后的打算)``，到放得下为止。
    """
    recipe = found.recipe
    lengths = _lengths(recipe, _models(recipe.student, recipe.teacher), [])
    device, engine, processes = found.device, found.step.engine, found.step.processes

    def candidate(recipe: Recipe, processes: int, engine: str) -> Plan:
        models = _models(recipe.student, recipe.teacher)
        return _planned(recipe, models, lengths, device, processes, engine, [])

    best = found
    for values in _changes(found):
        tried = candidate(_changed(best.recipe, values), processes, engine)
        if tried.total < best.total:
            best = tried
            yield " ".join(f"{key}={value}" for key, value in values.items()), best
        if best.fits:
            return
    if device.kind == "cpu":  # 内存大家分，多几个进程也不多
        return
    engine = "fsdp2" if engine == "ddp" else engine
    for more in (count for count in (2, 4, 8, 16) if count > processes):
        tried = candidate(best.recipe, more, engine)
        if tried.total < best.total:
            best = tried
            yield f"--processes {more} --engine {engine}", best
        if best.fits:
            return


def _changes(found: Plan) -> Iterator[dict[str, str]]:
    """可改的键与值：不改变结果的在先，改变方法的在后。"""
    recipe, step = found.recipe, found.step
    half, dtype = ("fp16", "float16") if found.device.name == "t4" else ("bf16", "bfloat16")
    size, window = step.batch_size, step.accumulation
    while size > 1 and size % 2 == 0:
        size, window = size // 2, window * 2
        yield {
            "train.batch_size": str(size),
            "train.gradient_accumulation_steps": str(window),
        }
    if not step.checkpointing:
        yield {"train.activation_checkpointing": "true"}
    if step.precision == "fp32" and found.device.kind == "cuda":
        yield {"train.precision": half}
    if recipe.teacher is not None and step.teacher_precision == "fp32":
        yield {"teacher.dtype": dtype}
    if step.teacher is not None and step.processes > 1 and not step.shard_teacher:
        yield {"teacher.shard": "true"}
    if recipe.student.path is not None and recipe.student.lora is None:
        yield {"student.lora.rank": "16", "student.lora.dtype": dtype}
    if recipe.teacher is not None and recipe.student.path and recipe.data.format == "chat":
        # SeqKD：教师的 response 由 distillab synthesize 先写好，训练时不要教师
        yield {"teacher": "null", "loss.alpha": "0", "responses": "{student_fraction: 0}"}


def _changed(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    """盖过几个键；值是命令行上的写法。"""
    raw = recipe.values()
    for key, value in values.items():
        *sections, last = key.split(".")
        section = raw
        for name in sections:
            if section[name] is None:
                section[name] = {}
            section = section[name]
        section[last] = yaml.safe_load(value)
    return Recipe.model_validate(raw)


@dataclass(frozen=True)
class _Models:
    student: Planned
    teacher: Planned | None
    shared: bool  # 教师就是关掉 adapter 的学生


def _models(section: StudentSection, source: ModelSource | None) -> _Models:
    teacher = None if source is None else find_shape(source.path)
    if section.path is not None:
        student = find_shape(section.path)
    elif section.config is not None:
        student = Planned(Shape.of(section.config), section.config.max_seq_len)
    elif section.init is not None:
        assert teacher is not None  # Recipe 已查过
        assert section.init.layers is not None
        student = replace(teacher, shape=replace(teacher.shape, num_layers=section.init.layers))
    else:
        student = Planned(Shape.of(ModelConfig()), ModelConfig().max_seq_len)
    if section.init is not None:
        # 由教师裁剪的是 StudentModel：输出层与 embedding 绑定，q、k、v 有偏置。
        shape = replace(student.shape, tied=True, qkv_bias=True, qk_norm=False)
        student = replace(student, shape=shape)
    shared = (
        section.lora is not None
        and source is not None
        and source.path == section.path
        and source.dtype == section.lora.dtype
        and source.trust_remote_code == section.trust_remote_code
    )
    return _Models(student, teacher, shared)


def _planned(
    recipe: Recipe,
    models: _Models,
    lengths: Lengths,
    device: Device,
    processes: int,
    engine: str,
    notes: list[str],
) -> Plan:
    config = recipe.train
    precision = _precision(config.precision, device, notes)
    lora = recipe.student.lora

    def frozen(dtype: str) -> str:
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "auto": precision}
        return names[dtype]

    sampling = None
    if recipe.responses.on_policy:
        rows = min(config.batch_size * config.gradient_accumulation_steps, ROWS_TOGETHER)
        sampling = Sampling(rows, lengths.prompt, lengths.student - lengths.prompt)
    chat = recipe.data.format == "chat"
    step = Step(
        student=models.student.shape,
        teacher=None if models.teacher is None else models.teacher.shape,
        batch_size=config.batch_size,
        seq_len=lengths.student,
        teacher_seq_len=lengths.teacher,
        rows=config.batch_size * lengths.rows,
        padded=chat and config.batch_size > 1,
        accumulation=config.gradient_accumulation_steps,
        distils=recipe.loss.alpha > 0,
        precision=precision,
        teacher_precision="fp32" if recipe.teacher is None else frozen(recipe.teacher.dtype),
        checkpointing=config.activation_checkpointing,
        lora_rank=None if lora is None else lora.rank,
        base_precision="fp32" if lora is None else frozen(lora.dtype),
        self_teacher=models.shared,
        shard_teacher=recipe.teacher is not None and recipe.teacher.shard and processes > 1,
        engine=engine,
        processes=processes,
        sampling=sampling,
    )
    if step.distils and step.teacher is not None and step.teacher_precision not in device.flops:
        notes.append(
            f"{device.name} has no fast {step.teacher_precision}: the teacher is counted at the "
            f"rate of fp32"
        )
    steps = _steps(recipe.train, recipe.responses.reuse, step, lengths)
    return Plan(recipe, step, device, steps, tuple(dict.fromkeys(notes)))


def _precision(wanted: str, device: Device, notes: list[str]) -> str:
    if wanted == "auto":
        if device.kind == "cuda":
            return "bf16" if "bf16" in device.flops else "fp16"
        from ..loss.products import has_bfloat16_units

        return "bf16" if has_bfloat16_units() else "fp32"
    if wanted in device.flops:
        return wanted
    instead = "fp16" if device.kind == "cuda" else "fp32"
    notes.append(
        f"train.precision={wanted} does not run on {device.name}: planned for {instead} "
        f"(--set train.precision={instead})"
    )
    return instead


def _lengths(recipe: Recipe, models: _Models, notes: list[str]) -> Lengths:
    data = recipe.data
    models_longest = models.student.max_seq_len
    if models.teacher is not None:
        models_longest = min(models_longest, models.teacher.max_seq_len)
    if data.format == "text":
        length = data.max_seq_len or models.student.max_seq_len
        sequences = None
        if data.size_mb is not None:
            sequences = int(data.size_mb * 1e6 * (1 - data.validation_fraction)
                            / BYTES_PER_TOKEN / length)  # fmt: skip
            if recipe.train.max_steps is None:
                notes.append(
                    f"the data is all of size_mb={data.size_mb:g}, at {BYTES_PER_TOKEN:g} bytes a "
                    f"token"
                )
        return Lengths(length, length, length, length, sequences)
    limit = data.max_seq_len or models_longest
    new = recipe.sampling.max_new_tokens if recipe.responses.on_policy else 0
    local = _local(data.source)
    if not local or (data.teacher_source is not None and not _local(data.teacher_source)):
        why = "data.max_seq_len" if data.max_seq_len else "the models' longest, no data.max_seq_len"
        notes.append(
            f"the data is not read: every sequence has {limit:,} tokens in both views ({why}), "
            f"all of them responses"
        )
        return Lengths(limit, limit, limit, max(1, limit - new))
    pairs, _ = load_pairs(data.model_copy(update={"responses": None}), need_response=False)
    answer = 0
    if data.responses is not None:
        answer = recipe.synthesize.sampling.max_new_tokens
    prompts = [max(_tokens(pair.student, False) for pair in pairs),
               max(_tokens(pair.teacher, False) for pair in pairs)]  # fmt: skip
    answer = max([answer, new, *(_response(pair.student) for pair in pairs)])
    student, teacher = (min(limit if not new else models_longest, p + answer) for p in prompts)
    notes.append(
        f"{len(pairs):,} records in {data.source}: the longest has about {student:,} tokens, "
        f"{teacher:,} for the teacher, {answer:,} of them its response"
    )
    kept = int(len(pairs) * (1 - data.validation_fraction))
    return Lengths(student, teacher, min(answer, student), max(1, student - answer), kept)


def _local(source: str) -> bool:
    try:
        kind = parse_source(source).kind
        return kind in ("path", "shipped") and Path(fetch(source)).exists()
    except DistillabError:
        return False


def _tokens(conversation: Conversation, response: bool) -> int:
    messages = conversation.messages if response else conversation.prompt
    size = sum(len(message["content"].encode()) for message in messages)
    return (
        round(size / SHORT_BYTES_PER_TOKEN) + MESSAGE_TOKENS * (len(messages) + 1) + SYSTEM_TOKENS
    )


def _response(conversation: Conversation) -> int:
    if conversation.response is None:
        return 0
    return round(len(conversation.response.encode()) / SHORT_BYTES_PER_TOKEN) + MESSAGE_TOKENS


def _steps(config: TrainingConfig, reuse: int, step: Step, lengths: Lengths) -> int | None:
    if lengths.examples is None:
        return config.max_steps
    batches = lengths.examples // (step.batch_size * step.processes)
    total = config.num_epochs * -(-batches // step.accumulation) * reuse
    return min(config.max_steps or total, total)
