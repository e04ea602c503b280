"""把解码的一步录成 CUDA graph：几百个内核一次提交，主机不再是瓶颈。"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import typed_reason

logger = logging.getLogger("distillab")

_FAILED: set[frozenset[type]] = set()
"""录不成的模型由哪些类的模块组成；别的模型仍然录。"""

_LAST: dict[int, torch.cuda.CUDAGraph] = {}
"""每块设备最近录的：下一个接着用它的内存。里面只有一步之内的临时张量，谁先谁后重放都不相干；不接着
用，每录一次就多占一份。"""


def recordable(model: nn.Module) -> bool:
    """权重都在当前的 CUDA 设备上，是普通的张量：分片的要通信，量化的各有各的内核。"""
    weights = list(model.parameters())
    if _kind(model) in _FAILED or not all(weight.is_cuda for weight in weights):
        return False
    current = torch.cuda.current_device()
    return all(
        weight.device.index == current
        and type(weight.data) is Tensor
        and not hasattr(weight, "ds_id")
        for weight in weights
    )


def _kind(model: nn.Module) -> frozenset[type]:
    return frozenset(map(type, model.modules()))


def record(model: nn.Module, step: Callable[[], None]) -> Callable[[], None] | None:
    """算 ``model`` 的一步，再录下一步（录的时候不执行），返回重放它的函数。

    ``step`` 只就地改写它自己的张量，不问设备任何事。录不成是 ``None``，在日志里说一次。
    """
    try:
        return _recorded(step)
    except _RecordingFailed as error:
        _FAILED.add(_kind(model))
        logger.warning(
            "a CUDA graph cannot be recorded here, sampling runs operator by operator: "
            "same tokens, slower (%s)",
            typed_reason(error.__cause__ or error),
        )
        return None


class _RecordingFailed(Exception):
    """录不成；这一步已经算过。"""


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            _warm_up(step)
            return _captured(step)
    finally:
        current.wait_stream(side)


def _warm_up(step: Callable[[], None]) -> None:
    """算一步：cuBLAS 的工作区等在第一次用到时才分配，不能分配在 graph 里。

    要等设备的一步在这里就现形：录到一半才出错，分配器会一直以为还在录。
    """
    try:
        with waiting_is_an_error():
            step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        step()
        raise _RecordingFailed from error


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """其间主机要等设备就抛出 ``RuntimeError``。"""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 它说自己还在试验
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    try:
        try:
            return _capture(step)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # 录制时分配器不会把留着没用的还给设备
            return _capture(step)
    except Exception as error:
        raise _RecordingFailed from error


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """不用 ``torch.cuda.graph``：它每次都等设备，还清空分配器。"""
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    pool = _LAST[device].pool() if device in _LAST else None
    with _no_collecting():
        # thread_local：取数据的线程照常用 CUDA
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            step()
        except Exception:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    _LAST[device] = graph
    return graph.replay


@contextmanager
def _no_collecting() -> Iterator[None]:
    """录制时回收到别的 CUDA 对象会打断它。"""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """每块设备只用一条：每条流各有一份 cuBLAS 的工作区。"""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
