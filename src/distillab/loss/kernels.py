"""一行 logits 一个 program 的 Triton kernel：值、指标，以及直接写成半精度的、对矩阵乘结果的梯度。

数学与 ``rows.py`` 相同，读写少得多：第一遍在线求两个模型的最大值与归一化项，第二遍求值；
``forward_kl`` 与 ``reverse_kl`` 同时写出梯度，其余的要再读一遍。和先在 ``BLOCK`` 条 lane 上各自以
float32 累加，再把 lane 加起来：两级，没有 float64（T4 上它慢 32 倍）。整块不加遮掩，一行最后不足一
块的才遮：每个元素少一条指令，全程就快 1% 上下。

导入这个模块要有 Triton；``TRITON_INTERPRET=1`` 时在 CPU 上逐条解释执行。
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel_math import LOG2_E, contribution, finish, grown, log1p, log_ratio, together
from .rows import RowSpec, RowValues

BLOCK = 1024
"""一个 program 一次读这么多列：每个线程 4 个 float32，正好 16 字节。"""

WARPS = 8
"""寄存器够 SM 同时放 3 到 6 个这样的 program（``benchmarks/kernels.py``）。"""

CLOSE = tl.constexpr(2e-3)
"""两个模型的 logits 处处相差不到这么多时，归一化项之差由 ``u + u²/2`` 的平均得出，没有相减。"""

LOWEST = tl.constexpr(-1e30)
"""还没有读到数时的最大值：有限，相减才不是 NaN。"""


@triton.jit
def _read(row, bias, offsets, stride, vocab, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
          TAIL: tl.constexpr):  # fmt: skip
    """一段 logits 与导数；``TAIL`` 时词表之外是 ``-inf``。

    缓冲区的一行补齐到 ``stride``，照它遮掩才能一次读 16 字节。
    """
    inside = offsets < vocab
    if TAIL:
        product = tl.load(row + offsets, mask=offsets < stride, other=0.0)
        product = tl.where(inside, product, float("-inf"))
    else:
        product = tl.load(row + offsets)
    return finish(product, bias, offsets, inside, SCALE, SOFTCAP)


@triton.jit
def _pair(student, teacher, bias, teacher_bias, offsets, stride, vocab,
          SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
          TEACHER_SOFTCAP: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """同一段上两个模型的 logits，与学生的导数；没有教师时它的就是学生的。"""
    s, slope = _read(student, bias, offsets, stride, vocab, SCALE, SOFTCAP, TAIL)
    if teacher is not None:
        t, _slope = _read(teacher, teacher_bias, offsets, stride, vocab, TEACHER_SCALE,
                          TEACHER_SOFTCAP, TAIL)  # fmt: skip
        return s, t, slope
    return s, s, slope


@triton.jit
def _measure(
    student, teacher, bias, teacher_bias, offsets, stride, vocab,
    top, rest, plain_rest, logit_sum, partner, moment,
    teacher_top, teacher_rest, teacher_plain_rest, lead,
    DIVERGENCE: tl.constexpr, COLD: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, APART: tl.constexpr,
    SMOOTHS: tl.constexpr, GAPS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """第一遍的一段，返回更新了的十个状态，都是每条 lane 一个。"""
    s, t, _slope = _pair(student, teacher, bias, teacher_bias, offsets, stride, vocab,
                         SCALE, SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, TAIL)  # fmt: skip
    if APART:
        _above, _decay, _old, plain_rest = grown(s, top, plain_rest, LOG2_E)
    above, decay, old, new_rest = grown(s, top, rest, COLD * LOG2_E)
    if teacher is not None:
        u = s - t
        if GAPS:  # 没有概率的列上 -inf - -inf
            u = tl.where(s > float("-inf"), u, 0.0)
        if DIVERGENCE == "reverse_kl":  # max 处的 u 是零点；max 换了，零点也换
            weight = tl.where(above, -1.0 - rest, 1.0)
            moment = moment * old + decay * weight * (u - (top - partner))
        if DIVERGENCE != "forward_kl":
            partner = tl.where(above, t, partner)
    rest = new_rest
    top = tl.maximum(top, s)
    if SMOOTHS:
        logit_sum += tl.where(s > float("-inf"), s, 0.0)
    if teacher is not None:
        if APART:
            _above, _decay, _old, teacher_plain_rest = grown(
                t, teacher_top, teacher_plain_rest, LOG2_E
            )
        above, decay, old, teacher_rest = grown(t, teacher_top, teacher_rest, COLD * LOG2_E)
        u *= COLD
        near = tl.where(tl.abs(u) < CLOSE, u + u * (0.5 * u), float("nan"))
        lead = lead * old + tl.where(above, 1.0, decay) * near
        teacher_top = tl.maximum(teacher_top, t)
    return (top, rest, plain_rest, logit_sum, partner, moment,
            teacher_top, teacher_rest, teacher_plain_rest, lead)  # fmt: skip


@triton.jit
def _weigh(
    student, teacher, gradient, bias, teacher_bias, offsets, stride, vocab, label, miss, present,
    top, teacher_top, apart, tops, ratio, star, share, teacher_share, plain_share, origin, centre,
    worth, surprise, hits, pull,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr, ALPHA: tl.constexpr, TEMPERATURE: tl.constexpr,
    SMOOTHING: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, FACTOR: tl.constexpr,
    APART: tl.constexpr, GAPS: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """后面各遍的一段：写出梯度（``WRITES``），返回更新了的四个状态（``SUMS`` 时才更新）。"""
    s, t, slope = _pair(student, teacher, bias, teacher_bias, offsets, stride, vocab,
                        SCALE, SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, TAIL)  # fmt: skip
    d_logits, q = s * 0, s * 0
    if teacher is not None:
        f, h, p, q = contribution(
            s, t, top, teacher_top, apart, tops, ratio, star, share, teacher_share,
            DIVERGENCE, MIX, 1 / TEMPERATURE, GAPS,
        )  # fmt: skip
        h -= origin
        if SUMS:
            below = t - teacher_top
            worth += f
            surprise -= tl.where(p > 0, p * below, 0.0) if GAPS else p * below
            hits = tl.maximum(hits, s - top + below)  # 两个都最大时才是 0
            pull += q * h
        d_logits = h if DIVERGENCE == "forward_kl" else q * (h - centre)
        d_logits *= ALPHA * TEMPERATURE
    if WRITES:
        if ALPHA < 1:
            if APART or teacher is None:
                q = tl.exp2((s - top) * LOG2_E) * plain_share
            q = tl.where(offsets == label, miss, q)
            if SMOOTHING > 0:
                q -= SMOOTHING / present
            d_logits += (1 - ALPHA) * q
        d_logits *= slope * FACTOR
        if GAPS:
            d_logits = tl.where(s > float("-inf"), d_logits, 0.0)
        d_logits = d_logits.to(gradient.dtype.element_ty)
        if TAIL:
            tl.store(gradient + offsets, d_logits, mask=offsets < stride)
        else:
            tl.store(gradient + offsets, d_logits)
    return worth, surprise, hits, pull


@triton.jit(do_not_specialize=["labels", "vocab", "rows"])
def distil_rows(
    student, teacher, gradient, labels, bias, teacher_bias, values, stride, vocab, rows,
    DIVERGENCE: tl.constexpr, MIX: tl.constexpr, ALPHA: tl.constexpr, TEMPERATURE: tl.constexpr,
    SMOOTHING: tl.constexpr, ABSENT: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``rows.dense_rows``，标签的一项在内：``student``、``teacher [R, stride]`` float32 只读。

    ``gradient [R, stride]`` 半精度，乘了 ``FACTOR``，补齐的列是 0；``values [5, R]`` float32 是
    ``RowValues``。没有的张量是 ``None``，没有算的值是 0。V 列里有 ``ABSENT`` 列是 ``-inf``。
    """
    row = tl.program_id(0).to(tl.int64)  # 行号乘词表可以超过 int32
    DISTILS: tl.constexpr = teacher is not None
    LEARNS: tl.constexpr = gradient is not None
    COLD: tl.constexpr = 1 / TEMPERATURE
    APART: tl.constexpr = TEMPERATURE != 1.0 and labels is not None  # 标签的一项另有归一化项
    HOLES: tl.constexpr = ABSENT > 0
    student += row * stride
    if DISTILS:
        teacher += row * stride
    if LEARNS:
        gradient += row * stride
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK  # 之后还有不足一块的
    present = (vocab - ABSENT).to(tl.float32)
    nothing = tl.zeros([BLOCK], tl.float32)

    top, teacher_top = nothing + LOWEST, nothing + LOWEST
    rest, plain_rest, logit_sum, partner, moment = nothing, nothing, nothing, nothing, nothing
    teacher_rest, teacher_plain_rest, lead = nothing, nothing, nothing
    for part in tl.static_range(0, 2):  # 整块的，不足一块的
        for index in range(0, 1 if part == 1 else whole):
            block = whole if part == 1 else index
            (top, rest, plain_rest, logit_sum, partner, moment,
             teacher_top, teacher_rest, teacher_plain_rest, lead) = _measure(
                student, teacher, bias, teacher_bias, block * BLOCK + lanes, stride, vocab,
                top, rest, plain_rest, logit_sum, partner, moment,
                teacher_top, teacher_rest, teacher_plain_rest, lead,
                DIVERGENCE, COLD, SCALE, SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP,
                APART, SMOOTHING > 0, HOLES or part == 1, part == 1,
            )  # fmt: skip

    highest = tl.max(top, 0)
    first, decay, rest_sum = together(top, rest, lanes, COLD * LOG2_E)
    plain_sum, share = rest_sum, 1 / (1 + rest_sum)
    if APART:
        _first, _decay, plain_sum = together(top, plain_rest, lanes, LOG2_E)
    plain_share = 1 / (1 + plain_sum)
    divergence, cross_entropy, teacher_cross_entropy, entropy, agreement = 0.0, 0.0, 0.0, 0.0, 0.0
    teacher_highest, teacher_share, apart, tops, ratio, star, origin, centre = (
        0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    if DISTILS:
        teacher_highest = tl.max(teacher_top, 0)
        _first, teacher_decay, teacher_sum = together(
            teacher_top, teacher_rest, lanes, COLD * LOG2_E
        )
        teacher_plain_sum, teacher_share = teacher_sum, 1 / (1 + teacher_sum)
        if APART:
            _first, _decay, teacher_plain_sum = together(
                teacher_top, teacher_plain_rest, lanes, LOG2_E
            )
        # d 是 u - tops 与归一化项之比 ratio 之差；apart 是 tops 的整数部分，从 s 里减去它没有舍入
        ratio = log_ratio(rest_sum, teacher_sum)
        apart = tl.floor(highest - teacher_highest + ratio * TEMPERATURE + 0.5)
        tops = highest - apart - teacher_highest
        lead_mean = tl.sum(lead * teacher_decay, 0) * teacher_share
        near = log1p(lead_mean) - (highest - teacher_highest) * COLD
        ratio = tl.where(lead_mean == lead_mean, near, ratio)
        # 学生最大的一列上教师的 logit：h 从这一列算起，几乎确定的学生的梯度全是别处与它之差
        there = tl.sum(tl.where(first, partner, 0.0), 0)
        star = highest - apart - there
        if DIVERGENCE == "reverse_kl":
            moment += (1 + rest) * (top - partner - (highest - there))
            centre = tl.sum(moment * decay, 0) * (share * COLD)  # E_q[d] 减去最大那一列的 d

    label, miss = 0, 0.0
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32)
        logit, teacher_logit, _unused = _pair(
            student, teacher, bias, teacher_bias, label + tl.zeros([1], tl.int32), stride, vocab,
            SCALE, SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, False,
        )  # fmt: skip
        log_sum = log1p(plain_sum)
        behind = highest - tl.sum(logit, 0)
        cross_entropy = log_sum + behind
        # q - 1：标签最可能时正是 -rest / (1 + rest)
        miss = (tl.exp2(-behind * LOG2_E) - 1 - plain_sum) * plain_share + SMOOTHING
        if SMOOTHING > 0:
            average = log_sum + (highest - tl.sum(logit_sum, 0) / present)
            cross_entropy = (1 - SMOOTHING) * cross_entropy + SMOOTHING * average
        if DISTILS:
            teacher_log_sum = log1p(teacher_plain_sum)
            teacher_cross_entropy = teacher_log_sum + (teacher_highest - tl.sum(teacher_logit, 0))

    values += row
    tl.store(values + rows, cross_entropy)
    tl.store(values + 2 * rows, teacher_cross_entropy)

    # 其余的 divergence 要先知道 E_q[h]，才写得出梯度：先只求和，再读一遍
    ONCE: tl.constexpr = DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl"
    LAST: tl.constexpr = 1 if DISTILS and (LEARNS and not ONCE) else 0
    if LAST:
        _f, origin, _p, _q = contribution(
            highest, there, highest, teacher_highest, apart, tops, ratio, star, share,
            teacher_share, DIVERGENCE, MIX, COLD, False,
        )  # fmt: skip
    worth, surprise, pull = nothing, nothing, nothing
    hits = nothing + LOWEST
    # 上一遍最后读的还在缓存里，这一遍从那里读起：方向因而相反，不足一块的先读
    for step in tl.static_range(0, LAST + 1 if DISTILS or LEARNS else 0):
        for part in tl.static_range(0, 2):
            for index in range(0, 1 if part == step else whole):
                block = index if step == 1 else whole - 1 - index
                block = whole if part == step else block
                worth, surprise, hits, pull = _weigh(
                    student, teacher, gradient, bias, teacher_bias, block * BLOCK + lanes, stride,
                    vocab, label, miss, present, highest, teacher_highest, apart, tops, ratio, star,
                    share, teacher_share, plain_share, origin, centre, worth, surprise, hits, pull,
                    DIVERGENCE, MIX, ALPHA, TEMPERATURE, SMOOTHING, SCALE, SOFTCAP, TEACHER_SCALE,
                    TEACHER_SOFTCAP, FACTOR, APART, HOLES or part == step, part == step,
                    step == 0, LEARNS and step == LAST,
                )  # fmt: skip
        if step < LAST:
            centre = tl.sum(pull, 0)

    if DISTILS:
        divergence = tl.sum(worth, 0)
        entropy = log1p(teacher_sum) + tl.sum(surprise, 0) * COLD
        agreement = tl.where(tl.max(hits, 0) == 0, 1.0, 0.0)
    tl.store(values, divergence)
    tl.store(values + 3 * rows, entropy)
    tl.store(values + 4 * rows, agreement)


def kernel_rows(
    student: Tensor,
    teacher: Tensor | None,
    d_logits: Tensor | None,
    labels: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    spec: RowSpec,
    factor: float,
) -> Tensor:
    """``rows.dense_rows`` 的 kernel 版：返回 ``RowValues [5, R]``，float32；输入不变。

    ``student``、``teacher [R, V]`` float32，行距相同，是 16 的倍数；梯度乘 ``factor``，写进
    ``d_logits``（半精度，行距也相同，补齐的列写 0），标签的一项已在内；``None`` 是不要梯度。
    """
    values = student.new_empty(len(RowValues._fields), len(student))
    with torch.cuda.device_of(student):
        distil_rows[(len(student),)](
            student,
            teacher,
            d_logits,
            labels,
            bias,
            teacher_bias,
            values,
            student.stride(0),
            spec.vocab,
            len(student),
            DIVERGENCE=spec.divergence,
            MIX=spec.mix,
            ALPHA=spec.alpha,
            TEMPERATURE=spec.temperature,
            SMOOTHING=spec.smoothing,
            ABSENT=spec.excluded,
            SCALE=spec.scale,
            SOFTCAP=spec.softcap,
            TEACHER_SCALE=spec.teacher_scale,
            TEACHER_SOFTCAP=spec.teacher_softcap,
            FACTOR=factor,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return values
