"""Triton kernel 逐元素的数学：与 ``rows.elementwise`` 相同的量，指令少，0 附近没有相近数相减。

GPU 的 exp2、log2 是近似的，所以 0 附近的 ``expm1``、``log1p`` 与它们减去主项之后剩下的，都由多项式
算。内存给得上数时，指令数就是时间：指数都以 2 为底，一个元素只求两次。
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

SMALL = tl.constexpr(0.5)
"""绝对值小于它时用多项式。"""


@triton.jit
def expm1_rest(x):
    """``(expm1(x) - x) / x²``，``-SMALL <= x <= 0``，相对误差 2e-8：在 Chebyshev 点上插值。"""
    rest = 0.04164993 + x * (0.00823822135 + x * 0.00116428703)
    return 0.49999999 + x * (0.166665628 + x * rest)


@triton.jit
def log1p_rest(y):
    """``(y - log1p(y)) / y²``，``-SMALL <= y <= 0``，相对误差 4e-8：在 Chebyshev 点上插值。"""
    rest = 0.180171744 + y * (1.10971595 + y * (1.51463278 + y * 1.29892866))
    rest = 0.250305097 + y * (-0.193908824 + y * (0.226563407 + y * rest))
    return 0.500000018 + y * (-0.333327528 + y * rest)


@triton.jit
def log1p(y):
    """``log(1 + y)``，每行只算几次：``|y| < SMALL`` 时是 ``2 atanh(y / (2 + y))`` 的级数。"""
    s = y / (2 + y)
    square = s * s
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.where(tl.abs(y) < SMALL, 2 * s * series, tl.log(1 + y))


@triton.jit
def log_ratio(a, b):
    """``log((1 + a) / (1 + b))``：相近时、接近 0 时、相差几个数量级时都准。"""
    y = (a - b) / (1 + b)
    return tl.where(tl.abs(y) < SMALL, log1p(y), tl.log((1 + a) / (1 + b)))


@triton.jit
def finish(product, bias, offsets, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """``rows.finish``：logits 与它对 ``product`` 的导数；``-inf`` 保持 ``-inf``。"""
    logits = product
    if bias is not None:
        logits += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        logits *= SCALE
    slope = tl.full(product.shape, SCALE, tl.float32)
    if SOFTCAP is not None:
        x = tl.abs(logits) * (-2 / SOFTCAP)
        e = tl.where(x > -SMALL, x + x * x * expm1_rest(x), tl.exp2(x * LOG2_E) - 1)
        tanh = -e / (2 + e)
        capped = SOFTCAP * tl.where(logits < 0, -tanh, tanh)
        logits = tl.where(product == float("-inf"), product, capped)
        slope = (4 * SCALE) * (1 + e) / ((2 + e) * (2 + e))
    return logits, slope


@triton.jit
def grown(x, top, rest, RATE: tl.constexpr):
    """在线的 ``rest = Σ exp(x - max) - 1`` 读进 x；返回 ``(x 是不是新的 max, x 与 max 中小的缩小
    多少, 旧的各项缩小多少, 新的 rest)``。

    少记那个 1：几乎确定的分布只有它之外的一点，``1 + rest`` 装不下。
    """
    above = x > top
    decay = tl.exp2(-tl.abs(x - top) * RATE)
    old = tl.where(above, decay, 1.0)
    return above, decay, old, rest * old + decay


@triton.jit
def together(top, rest, lanes, RATE: tl.constexpr):
    """各 lane 的 ``rest`` 合成一行的，仍少记一个 1；返回 ``(max 是不是这条, 各缩小多少, 和)``。"""
    first = lanes == tl.argmax(top, 0)
    decay = tl.exp2((top - tl.max(top, 0)) * RATE)
    return first, decay, tl.sum((rest + tl.where(first, 0.0, 1.0)) * decay, 0)


@triton.jit
def contribution(
    s, t, top, teacher_top, apart, tops, ratio, star, share, teacher_share,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr, COLD: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """``(f, h, p, q)``，含义见 ``rows.elementwise``；没有概率的列上 f、p、q 是 0。

    ``u = s - apart - t``；``tops`` 是两个 top 之间的，``star`` 是学生的 top 那一列的，那里的 h 在
    ``reverse_kl`` 已经减去。以 p、q 中较大的 ``big`` 为单位：另一个是 ``big (1 + e)``，
    ``e = expm1(x)``，``x = -|d|``。每个 f 都写成 ``big`` 乘一个二阶小量，不经过一阶的项。
    """
    u = s - apart - t
    if GAPS:
        u = tl.where(s > float("-inf"), u, 0.0)
    d = (u - tops) * COLD - ratio
    more = d > 0  # 学生给的更多
    x = -tl.abs(d)
    lower = tl.exp2(x * LOG2_E)
    small = x > -SMALL
    curve = x * x * expm1_rest(x)
    e = tl.where(small, x + curve, lower - 1)
    rest = tl.where(small, curve, e - x)  # e - x
    turn = tl.where(small, e * x - curve, lower * x - e)  # (1 + e) x - e
    big = tl.exp2(tl.where(more, s - top, t - teacher_top) * (COLD * LOG2_E))
    big *= tl.where(more, share, teacher_share)
    p, q = tl.where(more, big * lower, big), tl.where(more, big, big * lower)
    if DIVERGENCE == "forward_kl":
        f = big * tl.where(more, turn, rest)
        h = tl.where(more, -big * e, big * e)
    elif DIVERGENCE == "reverse_kl":
        f = big * tl.where(more, rest, turn)
        h = (u - star) * COLD
    elif DIVERGENCE == "jsd":  # m = W p + (1-W) q = big (1 + y)
        y = e * tl.where(more, MIX, 1 - MIX)
        below = y * y * log1p_rest(y)  # y - log1p(y)
        if (MIX if MIX > 0.5 else 1 - MIX) > 0.5:  # 否则 y 不会小于 -SMALL
            below = tl.where(y > -SMALL, below, y - tl.log2(1 + y) * LN_2)
        log = y - below
        # (1 + y) log1p(y) - y = y² - (1 + y) below
        f = big * (tl.where(more, MIX, 1 - MIX) * turn - (y * y - (1 + y) * below))
        h = (1 - MIX) * tl.where(more, -log, x - log)  # log q - log m
    else:  # m = W p + (1-W) q = big (1 + y) = 较小的 / (1 + z)；f 只要自己那一个与 m 之比
        FORWARD: tl.constexpr = DIVERGENCE == "skew_forward_kl"
        lesser = more if FORWARD else d <= 0
        W: tl.constexpr = MIX if FORWARD else 1 - MIX
        y = e * tl.where(more, W, 1 - W)
        share_of_big = 1 / (1 + y)
        z = (1 - MIX) * e * share_of_big
        r = tl.where(lesser, z, y)
        below = r * r * log1p_rest(r)  # r - log1p(r)
        log = tl.log2(1 + y) * LN_2
        below = tl.where(r > -SMALL, below, r - tl.where(lesser, x - log, log))
        # (1 + z) log1p(z) - z = z² - (1 + z) below，1 + z = (1 + e) / (1 + y)
        f = big * tl.where(lesser, (1 + y) * z * z - lower * below, below)
        if FORWARD:
            h = (1 - W) * tl.where(more, -z, y * share_of_big)
        else:
            h = tl.where(lesser, (1 - MIX) * z - below, below - y * (1 - MIX * share_of_big))
    return f, h, p, q
