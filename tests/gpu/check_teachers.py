"""GPU 上的教师经本项目的层来算：与 transformers 的相同，不等设备，录得成 CUDA graph。"""

import contextlib
import copy

import torch
from check_parts import VOCAB, Skip, pretrained, relative
from check_training import step_equals_cpu

from distillab.batch import Example, Tokens, View, collate_examples, collate_packed
from distillab.models.interface import PretrainedLM
from distillab.models.own_blocks import SharedDecoder, through_own_blocks
from distillab.teachers.in_process import LocalTeacher

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def views():
    """没有填充的、右边补齐的、几条放在一行的。"""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (40, 13, 60, 50)]
    tokens = [Tokens(ids, list(range(1, len(ids)))) for ids in rows]
    parts = [Example(each, each) for each in tokens]
    ids = torch.randint(VOCAB, (2, 100), generator=generator)
    yield View(ids, None, torch.arange(200))
    yield collate_examples(parts, pad_id=0).student
    yield collate_packed([parts[:2], parts[2:]], pad_id=0).student


@torch.no_grad()
def own_blocks_equal_transformers(device, dtype="float32", **layout):
    """隐状态与 float32 的 transformers 相同，到 dtype 的舍入为止；其间不等设备。"""
    kind = getattr(torch, dtype)
    if kind == torch.float16 and device == "cpu":
        raise Skip("fp16 needs a GPU")
    theirs = PretrainedLM(copy.deepcopy(reference := pretrained(**layout)).eval()).to(device)
    ours = through_own_blocks(PretrainedLM(reference.eval())).to(device, kind)
    assert isinstance(ours, SharedDecoder)
    worst = 0.0
    for view in views():
        on_device = view.map(lambda tensor: tensor.to(device))
        with no_waits(device):
            found = ours.read(on_device)
        worst = max(worst, relative(found, theirs.read(on_device).double()))
    said = f"hidden states within {worst:.1e}"
    assert worst <= ALLOWED[kind], said
    return said


@contextlib.contextmanager
def no_waits(device):
    """其间等一次设备就是错误。"""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def step_with_own_blocks_equals_cpu(device, **options):
    """教师经本项目的层的几步，同 CPU 上经 transformers 的一样。"""
    teacher = LocalTeacher(through_own_blocks(PretrainedLM(pretrained().eval())))
    return step_equals_cpu(device, teacher=teacher, **options)
