"""采样的几个界限：运行时照它们做，``plan`` 照它们估算；不导入 torch。"""

ROWS_TOGETHER = 32
"""最多这么多条一起采样：KV cache 才有上限。"""

MANY_STEPS = 16
"""至少要生成这么多步，才值得抄一遍权重。"""

MANY_ROWS = 4
"""至少有这么多行才按列存放权重：三行以内，MKL 对按行存放的另有快路。"""


def cache_room(length: int) -> int:
    """放 ``length`` 个 token 的 KV cache 预留几个：多一半，抄写的总量才与长度成正比。"""
    return length + max(64, length // 2)
