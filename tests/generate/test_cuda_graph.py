"""录一步的次序与退路，用假的 ``torch.cuda`` 走一遍；真的见 ``tests/gpu``。"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillab.generate import cuda_graph
from distillab.generate.cuda_graph import record


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def capture_begin(self, pool, capture_error_mode):
        self.cuda.said += ["begin", pool, capture_error_mode]

    def capture_end(self):
        self.cuda.said.append("end")
        if self.cuda.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")

    def pool(self):
        return "pool"

    def replay(self):
        self.cuda.said.append("replay")


@pytest.fixture
def cuda(monkeypatch):
    fake = SimpleNamespace(said=[], mode=0, invalid=False)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    replaced = {
        "CUDAGraph": lambda: FakeGraph(fake),
        "current_device": lambda: 0,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "empty_cache": lambda: fake.said.append("empty_cache"),
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda _: stream)
    monkeypatch.setattr(cuda_graph, "_LAST", {})
    monkeypatch.setattr(cuda_graph, "_FAILED", set())
    return fake


def test_one_step_runs_the_next_is_recorded_and_the_memory_of_the_last_is_used_again(cuda):
    modes = []
    for pool in (None, "pool"):
        cuda.said.clear()
        replay = record(nn.Identity(), lambda: modes.append(cuda.mode))
        assert modes == ["error", 0]
        assert cuda.said == ["begin", pool, "thread_local", "end"]
        replay()
        assert cuda.said[-1] == "replay"
        modes.clear()


def test_a_step_that_waits_for_the_device_runs_once_more_and_is_not_recorded(cuda, caplog):
    model, done = nn.Identity(), []

    def step():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        done.append(1)

    assert record(model, step) is None
    assert (done, cuda.said, cuda.mode) == ([1], [], 0)
    assert "same tokens, slower (RuntimeError: called a synchronizing" in caplog.text
    assert cuda_graph._kind(nn.Identity()) in cuda_graph._FAILED


def test_an_error_while_recording_ends_it_and_is_told_with_its_cause(cuda, caplog):
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2:
            cuda.invalid = True
            raise ValueError("not while recording")

    assert record(nn.Identity(), step) is None
    assert cuda.said[-1] == "end"
    assert "(ValueError: not while recording)" in caplog.text


def test_a_recording_without_memory_is_tried_again_with_what_the_allocator_kept(cuda):
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert record(nn.Identity(), step) is not None
    assert [word for word in cuda.said if word in ("begin", "end", "empty_cache")] == [
        "begin", "end", "empty_cache", "begin", "end",
    ]  # fmt: skip


def test_a_step_without_memory_is_the_callers_to_tell(cuda):
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        record(nn.Identity(), step)
    assert cuda.mode == 0
