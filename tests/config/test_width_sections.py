"""裁不成的宽度在配方里、在知道来源有多宽时各是一行；裁得成的补齐四个数。"""

import re

import pytest

from distillab.config.model_sections import InitConfig, ModelConfig
from distillab.config.schema import Recipe
from distillab.errors import DistillabError

SOURCE = ModelConfig(hidden_size=576, num_heads=9, num_kv_heads=3, intermediate_size=1536)


def init(**widths) -> InitConfig:
    return InitConfig.model_validate({"from": "teacher", "layers": 2, **widths})


def test_what_is_not_written_stays_as_wide_as_the_source():
    assert init(intermediate_size=1024).widths(SOURCE) == {
        "hidden_size": 576, "intermediate_size": 1024, "num_heads": 9, "num_kv_heads": 3,
    }  # fmt: skip
    assert not init().narrows


@pytest.mark.parametrize(
    ("widths", "head_dim"),
    [
        ({}, None),
        ({"intermediate_size": 8}, None),
        ({"hidden_size": 384, "num_heads": 6}, None),  # 6 * 64
        ({"hidden_size": 432}, 64),
        ({"num_heads": 6, "num_kv_heads": 2}, 64),
    ],
)
def test_heads_stay_as_wide_as_they_were(widths, head_dim):
    narrowed = SOURCE.narrowed(init(**widths).widths(SOURCE))
    assert narrowed.head_width == 64
    assert narrowed.head_dim == head_dim


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"hidden_size": 585}, "student.init.hidden_size=585 is larger than the 576 of its source; "
         "expected at most 576"),
        ({"intermediate_size": 1537}, "student.init.intermediate_size=1537 is larger than the "
         "1536 of its source; expected at most 1536"),
        ({"num_heads": 12}, "student.init.num_heads=12 is larger than the 9 of its source; "
         "expected at most 9"),
        ({"num_kv_heads": 9}, "student.init.num_kv_heads=9 is larger than the 3 of its source; "
         "expected at most 3"),
        ({"num_heads": 8}, "student.init: num_heads=8 is not divisible by num_kv_heads=3; "
         "expected num_kv_heads to be one of 1, 2"),
        ({"num_kv_heads": 2}, "student.init: num_heads=9 is not divisible by num_kv_heads=2; "
         "expected num_kv_heads to be one of 1, 3"),
        ({"hidden_size": 512}, "student.init: hidden_size=512 is not divisible by num_heads=9, and "
         "transformers would not load that; expected 504 or 513"),
        ({"num_heads": 5, "num_kv_heads": 1}, "student.init: hidden_size=576 is not divisible by "
         "num_heads=5, and transformers would not load that; expected 575"),
        ({"hidden_size": 7}, "student.init: hidden_size=7 is not divisible by num_heads=9, and "
         "transformers would not load that; expected 9"),
    ],
)  # fmt: skip
def test_widths_that_the_source_does_not_have_are_refused_in_one_line(widths, message):
    with pytest.raises(DistillabError) as error:
        init(**widths).widths(SOURCE)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": {"from": "teacher", "hidden_size": 0}}, "greater than 0"),
        ({"init": {"from": "teacher", "num_heads": -2}}, "greater than 0"),
        ({"init": {"from": "teacher", "hidden_size": 31.5}}, "valid integer"),
        ({"init": {"from": "teacher", "num_heads": 4, "num_kv_heads": 3}},
         "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"init": {"hidden_size": 32}}, "Field required"),
        ({"init": {"from": "teacher", "head_dim": 32}}, "Extra inputs"),
        ({"init": {"from": "teacher"}}, "init needs layers, or config.num_layers, or one of "
         "hidden_size, intermediate_size, num_heads, num_kv_heads"),
        ({"init": {"from": "teacher", "hidden_size": 32}, "config": {"hidden_size": 64}},
         "init.hidden_size=32 and config.hidden_size=64 disagree"),
        ({"init": {"from": "teacher", "hidden_size": 32}, "path": "model"},
         "path and init disagree"),
    ],
)  # fmt: skip
def test_widths_that_are_none_or_disagree_are_refused_with_the_recipe(student, message):
    base = {"name": "x", "data": {"source": "text.txt"}, "teacher": {"path": "teacher"}}
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe.model_validate({**base, "student": student})
