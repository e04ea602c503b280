"""损失的 Triton kernel：在解释器里与 float64 相同，不要 GPU 也能为几代卡编译，用不了时退回编译的。"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from objectives import relative
from test_fused import Case, half_products  # noqa: F401  (fixture)

from distillab.config.schema import LossConfig
from distillab.loss import buffers, fused
from distillab.loss.chunking import Chunking, budget_bytes
from distillab.loss.products import MixedProducts

ROOT = Path(__file__).parents[2]


def run(*command, **environment):
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "loss"), str(ROOT / "src")]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_equal_the_float64_reference_in_the_interpreter():
    """各个测试在 ``interpreted.py`` 里。"""
    pytest.importorskip("triton")
    run("-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore",
        "tests/loss/interpreted.py", TRITON_INTERPRET="1")  # fmt: skip


def test_kernels_compile_for_several_cards_and_spill_nothing(tmp_path):
    """没有 GPU：寄存器与溢出由 ptxas 说，V = 151,936。"""
    pytest.importorskip("triton")
    path = tmp_path / "kernels.json"
    run("benchmarks/kernels.py", "--cases", "4", "--json", str(path))
    found = json.loads(path.read_text())
    assert [one["arch"] for one in found] == [75, 80, 90]
    for one in found:
        assert one["spilled"] == 0
        assert one["registers"] <= 128
        assert one["shared"] <= 4096
        assert len(one["instructions"]) == 3  # 三遍，没有别的循环


@pytest.fixture
def case(half_products, monkeypatch):  # noqa: F811
    """CPU 上 GPU 的 bf16 乘法；输入已取整，只比较算术。"""
    monkeypatch.setattr(buffers.KERNELS, "failed", False)
    monkeypatch.setattr(buffers.COMPILER, "failed", False)
    products = MixedProducts(torch.bfloat16)
    monkeypatch.setattr(fused, "head_products", lambda *_: nullcontext(products))
    case = Case(rows=7, near=True)
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).bfloat16().float())
    return case


def check(case, kind="hidden"):
    """2 行一块：与 float64 的参考相同。"""
    loss = LossConfig()
    found, gradients = case.run(loss, kind, dtype=torch.bfloat16, memory_budget=2 * 512 * 12)
    expected, exact = case.oracle(loss, kind)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for gradient, right in zip(gradients, exact, strict=True):
        assert relative(gradient, right) < 0.01


def test_where_the_kernels_fail_the_loss_says_so_once_and_is_the_same(case, monkeypatch, caplog):
    """在一组的半途失败，已经写好的梯度也不丢；kernel 不改 logits，失败的那一块可以重来。"""
    calls = []

    def broken(self, rows):
        calls.append(rows)
        if len(calls) == 1:
            return self._by_tiles(rows)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(buffers.Chunks, "_by_kernel", broken)
    check(case)
    check(case)
    assert calls == [slice(0, 2), slice(2, 4)]
    assert caplog.text.count("the loss's Triton kernels cannot be used here") == 1
    assert "RuntimeError: no compiler" in caplog.text


def test_sparse_targets_ask_for_no_kernel(case, caplog):
    check(case, "renormalise")
    assert not buffers.KERNELS.failed
    assert not caplog.records


@pytest.mark.parametrize("memory", [14.7, 79.1])
@pytest.mark.parametrize("vocab", [400, 49_152, 151_665, 151_936, 262_144])
@pytest.mark.parametrize("rows", [0, 1, 100, 4088, 16_384])
def test_chunks_of_the_kernels_fit_the_card(rows, vocab, memory):
    budget = budget_bytes("cuda", int(memory * 2**30), True)
    found = Chunking.of(rows, vocab, 8, 2, "cuda", budget, True)
    assert found.buffer_bytes <= budget
    assert found.size % 64 == 0
    assert found.width % 64 == 0
    assert found.group <= -(-max(rows, 1) // found.size) * found.size
    assert found.group * found.width < 2**31  # 一块之内的偏移


def test_a_card_with_memory_to_spare_gets_larger_chunks():
    """V = 151,936：T4 连同梯度的累加不到 1 GiB；大卡上编译的一块可以到 1,024 行。"""
    sizes = {
        (memory, kernels): Chunking.of(
            4096, 151_936, 8, 2, "cuda", budget_bytes("cuda", memory * 2**30, kernels), kernels
        ).size
        for memory in (15, 80)
        for kernels in (True, False)
    }
    assert sizes == {(15, True): 256, (15, False): 256, (80, True): 384, (80, False): 1024}
