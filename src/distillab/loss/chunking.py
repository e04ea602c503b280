"""损失的分块：一块几行，缓冲区多大。``fused`` 照它分配，``plan`` 照它估算；不导入 torch。"""

from __future__ import annotations

from typing import NamedTuple

CPU_TILE = 8
"""CPU 上逐行算术一次做这么多行：中间结果留在缓存里。"""

CUDA_ROWS = 64
"""kernel 的一块是这么多行的倍数：矩阵乘的小块恰好填满。"""

GROUP = 2
"""kernel 把这么多块的梯度凑在一起，才做一次对 hidden、weight 的乘法：后者每次都要读写一遍整个
float32 的累加，V = 151,936、宽 512 时 0.62 GB。"""

PAIR_BYTES = 96
"""比较两个词表的分布时，一行里每个 token 在两边一共要这么多字节：排序的值与下标、概率、梯度。"""

LARGE = 36 * 2**30
"""设备的内存有这么多，块就不必再省：40 GB 的卡报告的比标称的少一点。"""


def budget_bytes(device: str, memory: int, kernels: bool) -> int:
    """``device``（``cpu`` 或 ``cuda``，``memory`` 字节）上块缓冲区的上限，单位字节。

    CPU 上 128 行的块已经与不分块的矩阵乘一样快。GPU 上块宜大：每块都要读一遍两个 head。kernel 的一
    份取到 V = 151,936 时 384 行一块；编译的逐行算术读写多，每块还要读写一遍 weight 的梯度。
    """
    if device == "cpu":
        return 160 * 2**20
    if memory < LARGE:
        return 512 * 2**20
    return 704 * 2**20 if kernels else 2 * 2**30


class Chunking(NamedTuple):
    """``P`` 行怎样切成块。"""

    size: int  # 一块几行
    tile: int  # 逐行算术一次做几行
    group: int  # 几行的梯度凑在一起
    width: int  # 缓冲区的一行有几列
    row_bytes: int  # logits 的一行，在各缓冲区里一共的字节数
    gradient_bytes: int  # 另放的梯度的一行的字节数；就写在 logits 里时是 0

    @classmethod
    def of(
        cls,
        rows: int,
        vocab: int,
        logit_bytes: int,
        gradient_bytes: int,
        device: str,
        budget: int,
        kernels: bool = False,
    ) -> Chunking:
        """缓冲区不超过 ``budget`` 字节（至少一行）；``*_bytes`` 是一个元素的，各缓冲区一共。

        CPU 上各块一样大：剩下几行也要把两个 head 读一遍。GPU 上只取 2 的幂：逐行算术一次做一块，
        编译过的代码不必为每批的行数重来。kernel 不挑行数，各块也一样大；它的一行补齐到 64 列，词表
        是奇数时，矩阵乘与 kernel 仍一次读写 16 字节。
        """
        width = -(-vocab // 64) * 64 if kernels else vocab
        together = GROUP if kernels and gradient_bytes else 1
        limit = max(1, budget // (width * (logit_bytes + together * gradient_bytes)))
        even = kernels or device == "cpu"
        unit = CUDA_ROWS if kernels or device != "cpu" else CPU_TILE
        if even and limit > unit:
            limit -= limit % unit
        if even:
            size = -(-rows // max(1, -(-rows // limit))) or 1
        else:
            size = 1 << (limit.bit_length() - 1)
            while size > unit and size // 2 >= rows:
                size //= 2
        if kernels:
            size = min(limit, -(-size // unit) * unit)
        tile = size if kernels or device != "cpu" else min(unit, size)
        group = size * min(together, max(1, -(-rows // size)))
        return cls(size, tile, group, width, width * logit_bytes, width * gradient_bytes)

    @property
    def buffer_rows(self) -> int:
        """Logits 的缓冲区的行数：一块补齐到整片。"""
        return -(-self.size // self.tile) * self.tile

    @property
    def buffer_bytes(self) -> int:
        """各缓冲区一共的字节数。"""
        return self.buffer_rows * self.row_bytes + self.group * self.gradient_bytes
