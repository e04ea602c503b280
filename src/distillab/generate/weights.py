"""采样期间的权重：LoRA 的 adapter 并进基座，CPU 上改为按列存放；autocast 里先转成半精度。

训练的权重一个比特也不动：``Parameter.data`` 暂时指向一份拷贝，退出时指回原来的张量。拷贝与
线性层的权重一样大，采样之后就释放；全参数训练时，此刻梯度正好不在。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import psutil
import torch
from torch import Tensor, nn

from ..limits import MANY_ROWS, MANY_STEPS
from ..loss.products import MixedProducts
from ..models.interface import LanguageModel
from ..models.kv_cache import autocast_dtype
from ..models.lora import adapters_off, is_plain_float32, mergeable_layers, merged_weight
from ..targets import Head


@contextmanager
def sampling_weights(model: LanguageModel, rows: int, steps: int) -> Iterator[None]:
    """换上采样用的权重，退出时还原。

    * float32 的基座并入 adapter：每层少两个小矩阵乘。半精度的基座不并，小于半格的更新会被舍掉，
      采样的就不是正在训练的模型了。
    * CPU 上 float32 的权重按列存放（``stride (1, out)``）：行数少时，MKL 的 ``x @ W.T`` 对按行
      存放的权重只有带宽的三分之一。

    * autocast 里冻结的 float32 权重一次转成半精度，不必每步转一遍，结果逐位相同，所以 adapter 也
      不并。训练的由 autocast 自己记着，不能换：``data`` 换了类型，autograd 就另起一个累积梯度的
      节点，DDP 挂在原来那个上的 hook 不再触发。输出层不在内，logits 总是 float32 的。

    分片的（FSDP2、ZeRO-3）与量化的权重原样不动；内存不够再放一份，或不到 ``MANY_STEPS`` 步时也是。
    """
    if steps < MANY_STEPS:
        yield
        return
    head = model.head.weight
    half = autocast_dtype(head.device)
    layers = {} if half else mergeable_layers(model)
    by_column = head.device.type == "cpu" and rows >= MANY_ROWS and not half
    if half:
        chosen = [w for w in _linear_weights(model) if not w.requires_grad and w is not head]
    else:
        chosen = [w for w in _linear_weights(model) if by_column or w in layers]
    on_cpu = sum(weight.nbytes for weight in chosen if weight.device.type == "cpu")
    if 2 * on_cpu > psutil.virtual_memory().available:
        yield
        return
    originals = [(weight, weight.data) for weight in chosen]
    with adapters_off(model) if layers else nullcontext():
        try:
            for weight in chosen:
                data = merged_weight(layers[weight]) if weight in layers else weight.data
                if half:
                    data = data.to(half)
                elif by_column:
                    data = _by_column(data)
                weight.data = data
            yield
        finally:
            for weight, data in originals:
                weight.data = data


def sampling_logits(head: Head) -> Callable[[Tensor], Tensor]:
    """``[B, H]`` 的隐状态 → ``[B, V]`` 的 float32 logits。

    每个 token 都要读一遍整个 head，所以 CUDA 上半精度的 head 原样相乘，autocast 里 float32 的先转成
    半精度，只转一次；累积与输出总是 float32。其余的就是 ``head.logits``。
    """
    device = head.weight.device
    compute = autocast_dtype(device) or head.weight.dtype
    if device.type != "cuda" or compute not in (torch.float16, torch.bfloat16):
        return head.logits
    products = MixedProducts(compute)
    weight = products.weight(head.weight)

    def logits(hidden: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            out = hidden.new_empty(len(hidden), len(weight), dtype=products.dtype)
            products.logits(products.rows(hidden), weight, out)
            return head.finish(out)

    return logits


def _by_column(matrix: Tensor) -> Tensor:
    """同样的值，按列存放。分段抄，一段的缓存行留在 L2 里，词表那么高的矩阵快一倍。"""
    result = torch.empty_strided(matrix.shape, (1, len(matrix)), dtype=matrix.dtype)
    for source, target in zip(torch.split(matrix, 1024), torch.split(result, 1024), strict=True):
        target.copy_(source)
    return result


def _linear_weights(model: nn.Module) -> list[Tensor]:
    """线性层的 float32 权重，绑定的只列一次；分片的与量化的不在内。"""
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
    }
    return [weight for weight in weights.values() if is_plain_float32(weight)]
