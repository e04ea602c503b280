"""采样的几个界限：运行时照它们做，``plan`` 照它们估算；不导入 torch。"""

ROWS_TOGETHER = 32
"""CPU 上最多这么多条一起采样：KV cache 才有上限。"""

FREE_SHARE = 0.5
"""GPU 上一起采样的那些至多用空着的显存的几成：分配器的碎片与临时的拷贝也要地方。"""

MANY_STEPS = 16
"""至少要生成这么多步，才值得抄一遍权重。"""

MANY_ROWS = 4
"""至少有这么多行才按列存放权重：三行以内，MKL 对按行存放的另有快路。"""


ROOM_STEP = 128
"""形状固定的 KV cache 一档这么多个位置；注意力的内核也要它是 8 的倍数。"""


def cache_room(length: int) -> int:
    """放 ``length`` 个 token 的 KV cache 预留几个：多一半，抄写的总量才与长度成正比。"""
    return length + max(64, length // 2)


def fixed_room(length: int) -> int:
    """形状固定的 KV cache 放 ``length`` 个 token 要几个位置：长短相近的几批，形状才相同。"""
    return -(-length // ROOM_STEP) * ROOM_STEP


def sampling_row_bytes(
    prompt: int, new_tokens: int, *, kv_bytes: int, wide_bytes: int, vocab_size: int
) -> int:
    """GPU 上采样的一行占几个字节：KV cache，外加读 prompt 的与逐个 token 的两段里大的那一段。

    ``kv_bytes``：一个 token 的键值。``wide_bytes``：前向最宽的一刻一个 token 的激活值。
    """
    reading = prompt * wide_bytes + 4 * prompt**2  # 后者是 mask 与它的浮点形式
    choosing = 12 * vocab_size * 4  # logits、过滤与抽样的中间结果，预热的与录下的各有一份
    return fixed_room(prompt + new_tokens) * kv_bytes + max(reading, choosing)


def rows_together(count: int, row_bytes: int, free: int) -> int:
    """GPU 上 ``count`` 条一次采样几条：放得进 ``free`` 字节的 ``FREE_SHARE``，各次一样多。"""
    most = max(1, int(FREE_SHARE * free) // row_bytes)
    return -(-count // -(-count // most))
