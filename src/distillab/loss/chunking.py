"""损失的分块：一块几行，缓冲区多大。``fused`` 照它分配，``plan`` 照它估算；不导入 torch。"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

BUDGET_BYTES = MappingProxyType({"cpu": 160 * 2**20, "cuda": 512 * 2**20})
"""块缓冲区的上限，单位字节。

CPU 上 128 行的块已经与不分块的矩阵乘一样快；GPU 上每块都要读写一遍整个 weight 的梯度，块宜大。
"""

CPU_TILE = 8
"""CPU 上逐行算术一次做这么多行：中间结果留在缓存里。"""


class Chunking(NamedTuple):
    """``P`` 行怎样切成块。"""

    size: int  # 一块几行
    tile: int  # 逐行算术一次做几行
    row_bytes: int  # 一行在各缓冲区里一共的字节数

    @classmethod
    def of(cls, rows: int, row_bytes: int, device: str, budget: int) -> Chunking:
        """缓冲区不超过 ``budget`` 字节（至少一行）。

        CPU 上各块一样大：剩下几行也要把两个 head 读一遍。GPU 上只取 2 的幂：逐行算术一次做一块，
        编译过的代码不必为每批的行数重来。
        """
        limit = max(1, budget // row_bytes)
        if device == "cpu":
            if limit > CPU_TILE:
                limit -= limit % CPU_TILE
            size = -(-rows // max(1, -(-rows // limit))) or 1
            return cls(size, min(CPU_TILE, size), row_bytes)
        size = 1 << (limit.bit_length() - 1)
        while size > 64 and size // 2 >= rows:
            size //= 2
        return cls(size, size, row_bytes)

    @property
    def buffer_rows(self) -> int:
        """缓冲区的行数：一块补齐到整片。"""
        return -(-self.size // self.tile) * self.tile

    @property
    def buffer_bytes(self) -> int:
        """各缓冲区一共的字节数。"""
        return self.buffer_rows * self.row_bytes
