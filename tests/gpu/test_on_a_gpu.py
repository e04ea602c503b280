"""``checks.py`` 的每一项，在 GPU 上；没有 GPU 时略过，``tests/benchmarks`` 里在 CPU 上走。"""

import pytest
import torch
from check_parts import Skip
from checks import CHECKS


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_it_holds(name):
    try:
        CHECKS[name]("cuda")
    except Skip as skip:
        pytest.skip(str(skip))
