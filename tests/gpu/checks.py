"""一块 GPU 上必须成立的事：每项一个函数，收下设备，返回一句话。

不成立是 ``AssertionError``，这台机器做不了是 ``Skip``。不用 pytest：``test_on_a_gpu.py`` 走它们，
``benchmarks/gpu.py`` 在只有 PyTorch 的机器上也走它们，各在自己的进程里。
"""

from functools import partial

from check_generation import (
    converted_equals_own,
    generation_equals_cpu,
    half_head_has_float32_logits,
    sampling_is_recorded,
    tokens_are_drawn_as_on_the_cpu,
)
from check_loss import (
    DIVERGENCES,
    kernels_equal_the_compiled,
    loss_in_chunks,
    loss_matches_float64,
)
from check_teachers import own_blocks_equal_transformers, step_with_own_blocks_equals_cpu
from check_training import (
    fp16_skips_and_goes_on,
    half_is_close,
    lora_equals_cpu,
    no_wait_before_the_optimizer,
    resume_is_exact,
    step_equals_cpu,
)

CHECKS = {
    **{
        f"loss, {divergence}": partial(loss_matches_float64, divergence=divergence)
        for divergence in DIVERGENCES
    },
    **{
        f"kernels = compiled, {divergence}": partial(
            kernels_equal_the_compiled, divergence=divergence
        )
        for divergence in DIVERGENCES
    },
    "loss in chunks": loss_in_chunks,
    "loss in chunks, bfloat16": partial(loss_in_chunks, dtype="bfloat16"),
    "step = CPU": step_equals_cpu,
    "step = CPU, two views": partial(step_equals_cpu, kind="pairs"),
    "step = CPU, accumulation": partial(
        step_equals_cpu, batch_size=2, gradient_accumulation_steps=2
    ),
    "step = CPU, sampled": partial(step_equals_cpu, kind="sampled"),
    "step = CPU, LoRA": lora_equals_cpu,
    "step = CPU, graphs": partial(step_equals_cpu, compile="auto", max_steps=8),
    "step = CPU, compiled": partial(step_equals_cpu, compile=True, max_steps=8),
    "step = CPU, own blocks": partial(step_with_own_blocks_equals_cpu, kind="pairs"),
    "step = CPU, own blocks, graphs": partial(
        step_with_own_blocks_equals_cpu, compile="auto", max_steps=8
    ),
    "own blocks = transformers": own_blocks_equal_transformers,
    **{
        f"own blocks = transformers, {layout}": partial(
            own_blocks_equal_transformers, layout=layout, head_dim=32, sliding_window=16
        )
        for layout in ("gemma2", "gemma3_text")
    },
    **{
        f"own blocks = transformers, {dtype}": partial(own_blocks_equal_transformers, dtype=dtype)
        for dtype in ("bfloat16", "float16")
    },
    "bf16 near float32": partial(half_is_close, precision="bf16"),
    "fp16 near float32": partial(half_is_close, precision="fp16"),
    "fp16 loss scale": fp16_skips_and_goes_on,
    "resume": resume_is_exact,
    "resume, graphs": partial(resume_is_exact, compile="auto"),
    "resume, fp16": partial(resume_is_exact, precision="fp16"),
    "generation = CPU": partial(generation_equals_cpu, strategy="greedy"),
    "generation = CPU, sampled": partial(generation_equals_cpu, strategy="sample"),
    "sampling recorded": sampling_is_recorded,
    "tokens drawn = CPU": tokens_are_drawn_as_on_the_cpu,
    "half head": half_head_has_float32_logits,
    "conversion": converted_equals_own,
    "no host wait": no_wait_before_the_optimizer,
    "no host wait, two views": partial(no_wait_before_the_optimizer, kind="pairs"),
    "no host wait, accumulation": partial(
        no_wait_before_the_optimizer, batch_size=2, gradient_accumulation_steps=2
    ),
    "no host wait, sampled": partial(no_wait_before_the_optimizer, kind="sampled"),
    "no host wait, LoRA": partial(no_wait_before_the_optimizer, kind="pairs", lora=True),
    "no host wait, fp16": partial(no_wait_before_the_optimizer, precision="fp16"),
    "no host wait, graphs": partial(no_wait_before_the_optimizer, compile="auto"),
}
"""名字 -> 检查，要紧的在前。"""
