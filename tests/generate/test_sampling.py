"""GPU 的抽样方法与 CPU 的选同一个 token。"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distillab.generate.sampling import BLOCK, filter_top_k, sample_by_blocks, sample_tokens
from distillab.generate.weights import sampling_logits
from distillab.targets import Head


@pytest.mark.parametrize(("size", "scale"), [(1000, 0.1), (1000, 10.0), (5001, 3.0), (20011, 1.0)])
def test_blocks_choose_the_same_token_up_to_ties_at_a_boundary(size, scale):
    draw = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(2500, size, generator=draw)
    uniform = torch.rand(2500, dtype=torch.float64, generator=draw)
    expected, found = sample_tokens(logits, uniform), sample_by_blocks(logits, uniform)
    for row in (expected != found).nonzero()[:, 0].tolist():
        boundaries = logits[row].double().softmax(-1).cumsum(-1)
        assert (boundaries - uniform[row]).abs().min() < 1e-7


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_tokens_without_probability_are_never_chosen(uniform):
    logits = torch.full((3, 2 * BLOCK + 90), -torch.inf)
    logits[0, 300] = logits[1, 300] = logits[1, -1] = logits[2, 255] = logits[2, 256] = 0.0
    number = torch.full((3,), uniform, dtype=torch.float64)
    expected = [300, 300 if uniform < 0.5 else 2 * BLOCK + 89, 255 if uniform < 0.5 else 256]
    assert sample_by_blocks(logits, number).tolist() == expected
    assert sample_tokens(logits, number).tolist() == expected


def test_a_peak_beyond_float32_keeps_to_its_filtered_tokens():
    draw = torch.Generator().manual_seed(0)
    logits = filter_top_k(30 * torch.randn(200, 3000, generator=draw), 5)
    uniform = torch.rand(200, dtype=torch.float64, generator=draw)
    assert torch.equal(sample_by_blocks(logits, uniform), sample_tokens(logits, uniform))


@pytest.mark.skipif(torch.__version__ < "2.11", reason="FakeTensor knows no mm with out_dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_head_on_a_gpu_is_multiplied_as_it_is_into_float32(dtype):
    with FakeTensorMode():
        weight = torch.empty(50, 8, dtype=dtype, device="cuda")
        logits = sampling_logits(Head(weight, scale=0.5))
        assert logits(torch.empty(3, 8, dtype=dtype, device="cuda")).dtype == torch.float32


def test_on_a_cpu_the_logits_are_those_of_the_head():
    head = Head(torch.randn(50, 8, dtype=torch.bfloat16))
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(sampling_logits(head)(hidden), head.logits(hidden))
