"""数算子：一段代码逐个执行了哪些 aten 算子，视图不算，它们不发内核。"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {"detach", "alias", "lift_fresh", "_unsafe_view", "empty", "empty_like",
              "empty_strided", "new_empty", "empty_memory_format"}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """``with Dispatched() as found: ...``，之后 ``found.operators`` 是名字 → 次数。"""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _NO_KERNEL:
            self.operators[name] += 1
        return function(*args, **kwargs or {})

    @property
    def total(self):
        return self.operators.total()


def dispatched(function, *args, **kwargs):
    """``function(*args, **kwargs)`` 执行的算子，名字 → 次数；不建计算图。"""
    with torch.no_grad(), Dispatched() as found:
        function(*args, **kwargs)
    return found.operators
