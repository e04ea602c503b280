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
    """``log(a / b)``，两个正数相近时也准，相差几个数量级时也准。"""
    y = (a - b) / b
    return tl.where(tl.abs(y) < SMALL, log1p(y), tl.log(a / b))


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
def contribution(
    s, t, top, teacher_top, shift, share, teacher_share,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr, COLD: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """``(f, h, p, q)``，含义见 ``rows.elementwise``；没有概率的列上 f、p、q 是 0。

    以 p、q 中较大的 ``big`` 为单位：另一个是 ``big (1 + e)``，``e = expm1(x)``，``x = -|d|``。每个
    f 都写成 ``big`` 乘一个二阶小量，不经过一阶的项。
    """
    d = (s - t) * COLD - shift
    if GAPS:
        d = tl.where(s > float("-inf"), d, 0.0)
    more = d > 0  # 学生给的更多
    x = -tl.abs(d)
    ratio = tl.exp2(x * LOG2_E)
    small = x > -SMALL
    rest = tl.where(small, x * x * expm1_rest(x), ratio - 1 - x)  # e - x
    e = tl.where(small, x + rest, ratio - 1)
    turn = e * x - rest  # (1 + e) x - e
    big = tl.exp2(tl.where(more, s - top, t - teacher_top) * (COLD * LOG2_E))
    big *= tl.where(more, share, teacher_share)
    p, q = tl.where(more, big * ratio, big), tl.where(more, big, big * ratio)
    if DIVERGENCE == "forward_kl":
        f = big * tl.where(more, turn, rest)
        h = tl.where(more, -big * e, big * e)
    elif DIVERGENCE == "reverse_kl":
        f = big * tl.where(more, rest, turn)
        h = d
    else:  # m = W p + (1-W) q = big (1 + y)
        W: tl.constexpr = 1 - MIX if DIVERGENCE == "skew_reverse_kl" else MIX
        y = e * tl.where(more, W, 1 - W)
        below = y * y * log1p_rest(y)  # y - log1p(y)
        if (W if W > 0.5 else 1 - W) > 0.5:  # 否则 y 不会小于 -SMALL
            below = tl.where(y > -SMALL, below, y - tl.log2(1 + y) * LN_2)
        log = y - below
        b = tl.where(more, -log, x - log)  # log q - log m
        if DIVERGENCE == "jsd":
            # (1 + y) log1p(y) - y = y² - (1 + y) below
            f = big * (tl.where(more, W, 1 - W) * turn - (y * y - (1 + y) * below))
            h = (1 - W) * b
        else:
            mixed = turn + below - e * log
            if DIVERGENCE == "skew_forward_kl":
                f = big * tl.where(more, mixed, below)
                h = (1 - W) * tl.where(more, -(1 - W) * e, y) / (1 + y)
            else:
                f = big * tl.where(more, below, mixed)
                h = b - MIX * tl.where(more, -y, W * e) / (1 + y)
    return f, h, p, q
