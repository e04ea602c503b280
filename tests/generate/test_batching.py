"""几条一起采样：CPU 上每 32 条，GPU 上看空着的显存。"""

import pytest
import torch

from distillab.generate import batching
from distillab.generate.batching import sampling_groups
from distillab.limits import fixed_room, rows_together, sampling_row_bytes
from distillab.models.interface import PretrainedLM
from distillab.models.student import StudentModel


def test_on_a_cpu_every_32_in_the_order_given(tiny_config):
    groups = sampling_groups(StudentModel(tiny_config), [5] * 40, 16)
    assert groups == [list(range(32)), list(range(32, 40))]


def test_the_bytes_of_a_cached_token_are_those_of_all_layers(tiny_config, tiny_qwen2):
    student = StudentModel(tiny_config)
    expected = 2 * 3 * 2 * 8 * 4  # 键与值，层，nkv，hd，float32
    assert batching._kv_bytes(student) == expected
    assert student.training
    with torch.autocast("cpu", torch.bfloat16):
        assert batching._kv_bytes(student) == expected // 2
    shape = tiny_qwen2.config
    layers, heads = shape.num_hidden_layers, shape.num_key_value_heads
    width = shape.hidden_size // shape.num_attention_heads
    assert batching._kv_bytes(PretrainedLM(tiny_qwen2)) == 2 * layers * heads * width * 4


def test_a_row_holds_its_cache_and_the_larger_of_reading_and_choosing():
    sizes = {"kv_bytes": 1000, "wide_bytes": 50, "vocab_size": 100}
    assert sampling_row_bytes(10, 30, **sizes) == 128 * 1000 + 48 * 100
    assert sampling_row_bytes(100, 30, **sizes) == 256 * 1000 + 100 * 50 + 4 * 100**2


@pytest.mark.parametrize(
    ("count", "row_bytes", "free", "rows"),
    [
        (64, 10, 10**9, 64),
        (64, 10, 20 * 40, 32),  # 一半能放 40 条，两次各 32
        (5, 10**6, 100, 1),  # 放不下也要一条一条地试
    ],
)
def test_as_many_rows_as_fit_in_half_of_the_free_memory_in_equal_parts(
    count, row_bytes, free, rows
):
    assert rows_together(count, row_bytes, free) == rows


def test_rooms_come_in_steps():
    assert [fixed_room(n) for n in (1, 128, 129, 700)] == [128, 128, 256, 768]
