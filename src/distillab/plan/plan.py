"""``distillab plan``：一份配方在一种设备上要多少内存、多少时间，放不下时改什么。

全由配方、模型的配置与形状算出；不加载模型，不下载权重。只有本地的对话文件会读，为的是知道有几条、
最长的有多长。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ..config.model_sections import CacheConfig, ModelConfig, ModelSource, StudentSection
from ..config.run_dir import RUNS, RunDirectory
from ..config.schema import Recipe, TrainingConfig
from ..parsing import parse_json
from .hardware import Device
from .lengths import Lengths, find_lengths
from .memory import Step
from .shapes import Planned, Shape, find_shape


@dataclass(frozen=True)
class Plan:
    """一份配方在一种设备上的打算。"""

    recipe: Recipe
    step: Step  # 一个进程上的一个 micro-batch
    device: Device  # 一个进程的那一份
    steps: int | None  # optimizer 步数；不读数据就不知道时是 None
    notes: tuple[str, ...]  # 假定了什么，英文，一条一句

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
            found["sampling"] *= self.sampled_share
        return {name: value * self.step.accumulation for name, value in found.items()}

    @property
    def sampled_share(self) -> float:
        """多少步从学生采样，``[0, 1]``；同一批用几次，只采一次。"""
        responses = self.recipe.responses
        start, final = responses.student_fraction, responses.final_student_fraction
        return (start if final is None else (start + final) / 2) / responses.reuse

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
            reading = read / device.bandwidth * self.sampled_share
            seconds["sampling"] = max(seconds["sampling"], reading)
        return sum(seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """所有进程合计，学生读的 token 每秒；没有算通信。"""
        return self.tokens / self.seconds

    def _precision_of(self, part: str) -> str:
        name = {"teacher": self.step.teacher_precision, "sampling": self.step.sampling_precision}
        precision = name.get(part, self.step.precision)
        return precision if precision in self.device.flops else "fp32"


def plan(recipe: Recipe, device: Device, processes: int = 1, engine: str = "ddp") -> Plan:
    """一份配方的打算；``processes`` 个进程每个一张 GPU，CPU 由它们分。模型的配置读不到是
    ``DistillabError``。
    """
    notes: list[str] = []
    lengths = _lengths(recipe, notes)
    return _planned(recipe, lengths, device.shared_by(processes), processes, engine, notes)


def suggestions(found: Plan) -> Iterator[tuple[str, Plan]]:
    """``found`` 放不下时依次该改的：``(命令行上的写法, 改后的打算)``，每一条在前面各条之上再改，到
    放得下为止。
    """
    best, lengths = found, _lengths(found.recipe, [])
    for values, processes in _changes(found):
        recipe, engine = _changed(best.recipe, values), found.step.engine
        if processes > found.step.processes and engine == "ddp":
            engine = "fsdp2"
        tried = _planned(recipe, lengths, found.device, processes, engine, [])
        if tried.total < best.total:
            best = tried
            keys = " ".join(f"{key}={value}" for key, value in values.items())
            yield keys or f"--processes {processes} --engine {engine}", best
        if best.fits:
            return


def _changes(found: Plan) -> Iterator[tuple[dict[str, str], int]]:
    """可改的：键与值，进程数。不改变结果的在先，改变方法的在后，最后是更多的进程。"""
    for values in _keys(found):
        yield values, found.step.processes
    if found.device.kind == "cuda":  # CPU 的内存大家分，多几个进程也不多
        yield from (({}, more) for more in (2, 4, 8, 16) if more > found.step.processes)


def _keys(found: Plan) -> Iterator[dict[str, str]]:
    recipe, step = found.recipe, found.step
    half, dtype = ("fp16", "float16") if found.device.name == "t4" else ("bf16", "bfloat16")
    size, window = step.batch_size, step.accumulation
    while size > 1 and size % 2 == 0:
        size, window = size // 2, window * 2
        sizes = ("train.batch_size", size), ("train.gradient_accumulation_steps", window)
        yield {key: str(value) for key, value in sizes}
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
    if recipe.teacher is not None and recipe.student.path and recipe.data.chat is not None:
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


def _lengths(recipe: Recipe, notes: list[str]) -> Lengths:
    student, teacher = _models(recipe.student, recipe.teacher)
    both = min(model.max_seq_len for model in (student, teacher or student))
    return find_lengths(recipe, student.max_seq_len, both, notes)


def _models(section: StudentSection, source: ModelSource | None) -> tuple[Planned, Planned | None]:
    """``(学生, 教师)``。"""
    teacher = None if source is None else find_shape(source.path)
    if section.path is not None:
        student = find_shape(section.path)
    elif section.init is not None:
        init, config = section.init, section.config
        own = init.source != "teacher"
        source_model = find_shape(init.source) if own else teacher
        assert source_model is not None  # Recipe 已查过
        whole = source_model.shape
        layers = init.layers or (whole if config is None else config).num_layers
        widths: dict[str, Any] = init.widths(whole)
        shape = replace(whole, num_layers=layers, **widths)
        student = Planned(shape, (config or source_model).max_seq_len)
    else:
        config = section.config or ModelConfig()
        student = Planned(Shape.of(config), config.max_seq_len)
    if section.init is not None:
        student = replace(student, shape=student.shape.copied())
    return student, teacher


def _trimmed(
    recipe: Recipe, student: Planned, teacher: Planned | None, notes: list[str]
) -> tuple[Planned, Planned | None]:
    """裁剪词表之后的两个模型：多大要数过才知道，数过的运行记着；还没有数就按不裁剪的算。

    ``bucket`` 时教师仍要乘整个输出层。
    """
    vocab, config = recipe.student.vocab, recipe.student.config
    if vocab is None:
        return student, teacher
    file = RunDirectory(RUNS / recipe.name).tokenizer / "vocabulary.json"
    if file.exists():
        size = len(parse_json(file.read_bytes(), str(file))["kept"])
        notes.append(f"student.vocab: {size:,} tokens, as counted in {file}")
    elif config is not None and "vocab_size" in config.model_fields_set:
        size = config.vocab_size
    else:
        size = (teacher or student).shape.vocab_size
        notes.append(
            f"student.vocab: its tokens are counted when the run starts; planned for all {size:,}, "
            f"so this is the most that it can take (or set student.config.vocab_size to try a size)"
        )
    student = replace(student, shape=replace(student.shape, vocab_size=size))
    if teacher is not None and vocab.outside == "renormalise":
        teacher = replace(teacher, shape=replace(teacher.shape, vocab_size=size))
    return student, teacher


def _planned(
    recipe: Recipe,
    lengths: Lengths,
    device: Device,
    processes: int,
    engine: str,
    notes: list[str],
) -> Plan:
    config, lora = recipe.train, recipe.student.lora
    models = _models(recipe.student, recipe.teacher)
    student, teacher = _trimmed(recipe, *models, notes)
    self_teacher = False  # 教师就是关掉 adapter 的学生
    if lora is not None and (source := recipe.teacher) is not None:
        own = (recipe.student.path, lora.dtype, recipe.student.trust_remote_code)
        self_teacher = (source.path, source.dtype, source.trust_remote_code) == own
    precision = _precision(config.precision, device, notes)
    frozen = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "auto": precision}
    step = Step(
        student=student.shape,
        teacher=None if teacher is None else teacher.shape,
        batch_size=config.batch_size,
        seq_len=lengths.student,
        teacher_seq_len=lengths.teacher,
        rows=config.batch_size * lengths.rows,
        padded=recipe.data.chat is not None and config.batch_size > 1,
        accumulation=config.gradient_accumulation_steps,
        distils=recipe.loss.alpha > 0,
        divergence=recipe.loss.divergence,
        precision=precision,
        teacher_precision="fp32" if recipe.teacher is None else frozen[recipe.teacher.dtype],
        checkpointing=config.activation_checkpointing,
        lora_rank=None if lora is None else lora.rank,
        base_precision="fp32" if lora is None else frozen[lora.dtype],
        self_teacher=self_teacher,
        shard_teacher=recipe.teacher is not None and recipe.teacher.shard and processes > 1,
        engine=engine,
        processes=processes,
        device_memory=device.memory,
    )
    if recipe.loss.across and recipe.student.tokenizer is not None:
        notes.append(
            "the teacher's tokens of the same text are taken to be as many as the student's"
        )
    if recipe.teacher is not None and (cache := recipe.teacher.cache) is not None:
        notes.append(_store_note(cache, student.shape.vocab_size, lengths))
    if recipe.responses.on_policy:
        step = step.with_sampling(
            config.batch_size * config.gradient_accumulation_steps,
            lengths.prompt,
            lengths.student - lengths.prompt,
            device.kind,
            device.memory - device.overhead,
        )
    if step.distils and step.teacher is not None and step.teacher_precision not in device.flops:
        notes.append(
            f"{device.name} has no fast {step.teacher_precision}: the teacher is counted at the "
            f"rate of fp32"
        )
    steps = _steps(config, recipe.responses.reuse, step, lengths)
    return Plan(recipe, step, device, steps, tuple(dict.fromkeys(notes)))


def _store_note(cache: CacheConfig, vocab_size: int, lengths: Lengths) -> str:
    size = cache.token_bytes(vocab_size)
    total = ""
    if lengths.examples is not None:
        total = f", at most {lengths.examples * lengths.rows * size / 1e9:.2f} GB for the data"
    return (
        f"teacher.cache: {size} bytes a token{total}; a text is asked once, so the teacher's time "
        f"is of the first epoch only"
    )


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


def _steps(config: TrainingConfig, reuse: int, step: Step, lengths: Lengths) -> int | None:
    if lengths.examples is None:
        return config.max_steps
    batches = lengths.examples // (step.batch_size * step.processes)
    total = config.num_epochs * -(-batches // step.accumulation) * reuse
    return min(config.max_steps or total, total)
