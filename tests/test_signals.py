"""信号变成「走完这一步再停」；几个进程的决定一致。"""

import signal
import threading

import pytest

from distillab.errors import HungUp, Terminated, exit_code
from distillab.signals import StopRequest, terminable


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "45")


def test_the_first_signal_asks_and_the_second_ctrl_c_raises():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.decision(processes=1) == signal.SIGINT


def test_sigterm_that_comes_twice_still_saves(torchrun, caplog):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(stop.stopped("here"), Terminated)
    assert exit_code(stop.stopped("here")) == 143
    assert (
        "SIGTERM: saving after this step, before torchrun ends this process in 45 s" in caplog.text
    )
    assert caplog.text.count("SIGTERM: saving after this step") == 1


def test_hangup_saves_once_and_has_its_own_exit_code(caplog):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # 内核与 shell 各发一次
    assert stop.decision(processes=1) == signal.SIGHUP
    assert isinstance(stop.stopped("here"), HungUp)
    assert exit_code(stop.stopped("here")) == 129
    assert "SIGHUP: saving after this step" in caplog.text  # 出了 with 就说完了
    with pytest.raises(HungUp), terminable():
        signal.raise_signal(signal.SIGHUP)


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable(), StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_may_fail_without_losing_the_save(monkeypatch):
    said = threading.Event()

    def broken(*_):
        said.set()
        raise SystemExit(1)  # rich 遇到断了的管道

    monkeypatch.setattr("distillab.signals.logger.warning", broken)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert said.wait(10)
    assert stop.decision(processes=1) == signal.SIGINT


def test_sigterm_after_ctrl_c_is_the_second_ctrl_c_of_torchrun_alone(torchrun, monkeypatch):
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_several_processes_stop_only_when_they_have_agreed():
    with StopRequest() as one, StopRequest() as other:
        other._handle(signal.SIGTERM, None)
    assert other.decision(processes=2) is None
    votes = [sum(pair) for pair in zip(one.votes(), other.votes(), strict=True)]
    for stop in (one, other):
        assert stop.agree([7.0, *votes]) == [7.0]
        assert stop.decision(processes=2) == signal.SIGTERM
        assert exit_code(stop.stopped("here")) == 143


def test_a_step_too_long_for_the_grace_of_torchrun_is_pointed_out_once(torchrun, caplog):
    stop = StopRequest()
    stop.check_grace(44)
    assert not caplog.text
    stop.check_grace(50)
    stop.check_grace(50)
    assert caplog.text.count("took 50 s, but torchrun ends a process 45 s after SIGTERM") == 1


def test_outside_of_training_sigterm_raises_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
