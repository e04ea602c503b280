"""``synthesize``：问什么、留什么、断了怎么接。教师是写死的；真的教师见 test_local 与 e2e。"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from distillab import bars
from distillab.config.sections import FilterConfig, SamplingConfig, SynthesizeConfig
from distillab.data.pairs import Task
from distillab.data.responses import read_rows
from distillab.errors import DistillabError
from distillab.synthesize.questions import TOO_LONG, Answer, Unanswered
from distillab.synthesize.synthesize import question_seed, synthesize

KEYS = {
    "id",
    "sample",
    "response",
    "kept",
    "finish_reason",
    "model",
    "seed",
    "prompt_sha256",
    "tokens",
}


def kept_rows(path):
    return [row for row in read_rows(path) if row["kept"] is True]


def task(number, answer="4"):
    messages = [{"role": "user", "content": f"question {number}"}]
    return Task(f"t{number}", messages, answer, {"id": f"t{number}", "bonus": number})


TASKS = [task(number) for number in range(6)]


class Scripted:
    """按 ``reply(question)`` 回答，一批两个，记下被问过什么。"""

    def __init__(self, reply=lambda q: "4", model="scripted"):
        self.reply, self.model, self.asked = reply, model, []

    def describe(self):
        return {"kind": "scripted", "model": self.model}

    def answer(self, questions, stopped):
        questions = list(questions)
        while questions and not stopped():
            batch, questions = questions[:2], questions[2:]
            self.asked += [(q.task.id, q.sample) for q in batch]
            outcomes = []
            for question in batch:
                reply = self.reply(question)
                if isinstance(reply, str):
                    reply = Answer(question, reply, "stop", self.model, 3, question.seed)
                outcomes.append(reply)
            yield outcomes


def run(output, backend=None, tasks=TASKS, seed=0, provenance=None, **config):
    config = SynthesizeConfig(**{"sampling": SamplingConfig(temperature=0.7), **config})
    backend = backend or Scripted()
    return synthesize(tasks, backend, config, output, provenance=provenance or {}, seed=seed)


def rows(output):
    return [json.loads(line) for line in output.read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "r.jsonl"


def test_one_row_for_each_answer_with_its_origin_beside_the_file(output):
    report = run(output, samples=3, provenance={"teacher": {"path": "big"}, "recipe": "abc"})
    written = rows(output)
    assert {(r["id"], r["sample"]) for r in written} == {(t.id, s) for t in TASKS for s in range(3)}
    assert all(r.keys() == KEYS for r in written)
    assert written[0] | {"prompt_sha256": 0} == {
        "id": "t0", "sample": 0, "response": "4", "kept": True, "finish_reason": "stop",
        "model": "scripted", "seed": question_seed(0, "t0", 0), "prompt_sha256": 0, "tokens": 3,
    }  # fmt: skip
    assert len({r["seed"] for r in written}) == 18
    assert len({r["prompt_sha256"] for r in written}) == 6
    origin = json.loads(output.with_name("r.jsonl.provenance.json").read_text())
    assert origin["teacher"] == {"path": "big"}
    assert origin["recipe"] == "abc"
    assert origin["backend"] == {"kind": "scripted", "model": "scripted"}
    assert origin["sampling"]["temperature"] == 0.7
    assert origin["samples"] == 3
    assert origin["filter"] is None
    assert origin["versions"]["torch"]
    assert origin["created"][:2] == "20"
    assert len(origin["prompts_sha256"]) == 64
    assert (report.asked, report.kept, report.tokens, report.exit_code) == (18, 18, 54, 0)


def test_rejected_answers_are_written_too_and_not_asked_again(output):
    wrong = Scripted(lambda q: "5" if q.task.id in ("t1", "t4") else " 4.\n")
    report = run(output, wrong, filter=FilterConfig(exact=True))
    assert (report.kept, report.rejected) == (4, 2)
    assert {r["id"] for r in rows(output) if not r["kept"]} == {"t1", "t4"}
    assert {r["id"] for r in kept_rows(output)} == {"t0", "t2", "t3", "t5"}
    again = Scripted()
    report = run(output, again, filter=FilterConfig(exact=True))
    assert again.asked == []
    assert (report.asked, report.kept, report.rejected, report.tokens) == (6, 4, 2, 18)


def test_blank_and_too_long_are_never_kept(output):
    def reply(question):
        if question.task.id == "t0":
            return Answer(question, "", TOO_LONG, "scripted", 0, error="the prompt has 90 tokens")
        return " \n" if question.task.id == "t1" else "4"

    report = run(output, Scripted(reply), filter=FilterConfig(regex=""))
    assert (report.kept, report.rejected, report.too_long) == (4, 1, 1)
    by_id = {r["id"]: r for r in rows(output)}
    assert by_id["t0"]["error"] == "the prompt has 90 tokens"
    assert by_id["t0"]["kept"] is by_id["t1"]["kept"] is False
    assert "1 prompts do not fit" in str(report)


def test_unanswered_questions_are_counted_and_asked_by_the_next_run_only(output):
    down = Scripted(lambda q: Unanswered(q, "HTTP 500") if q.task.id in ("t2", "t3") else "4")
    report = run(output, down)
    assert (report.kept, report.failed, report.exit_code) == (4, 2, 1)
    assert str(report).splitlines()[-1] == (
        "2 are unanswered (2 x HTTP 500); run the same command again to ask only those"
    )
    up = Scripted()
    assert run(output, up).exit_code == 0
    assert up.asked == [("t2", 0), ("t3", 0)]
    assert Counter(r["id"] for r in rows(output)) == Counter(t.id for t in TASKS)


def test_truncated_answers_are_kept_and_counted(output):
    report = run(output, Scripted(lambda q: Answer(q, "4 and", "length", "scripted", 9)))
    assert (report.kept, report.truncated) == (6, 6)
    assert "6 answers were cut off: raise sampling.max_new_tokens" in str(report)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sampling": SamplingConfig(temperature=0.8)}, "sampling.temperature (was 0.7, is now 0.8)"),
        ({"samples": 2}, "samples (was 1, is now 2)"),
        ({"seed": 1}, "seed (was 0, is now 1)"),
        ({"backend": Scripted(model="other")}, 'backend.model (was "scripted", is now "other")'),
        ({"tasks": TASKS[:5]}, "prompts_sha256 (was"),
        ({"tasks": [*TASKS[:5], Task("t5", [], "4", {})]}, "prompts_sha256 (was"),
        ({"provenance": {"teacher": {"sha256": "b"}}}, 'teacher.sha256 (was "a", is now "b")'),
    ],
)  # fmt: skip
def test_resuming_with_another_origin_is_refused(output, change, key):
    same = {"provenance": {"teacher": {"sha256": "a"}, "recipe": "one"}}
    run(output, **same)
    before = output.read_bytes()
    with pytest.raises(DistillabError) as caught:
        run(output, **same | change)
    assert f"begun with other settings: {key}" in str(caught.value)
    assert ", " not in str(caught.value).split("settings: ")[1].split("; ")[0].replace(
        ", is now", ""
    )
    assert output.read_bytes() == before
    same["provenance"]["recipe"] = "two"
    run(output, **same, tasks=TASKS[::-1])  # 配方别处的改动与任务的先后不算


def test_greedy_answers_do_not_depend_on_the_seed(output):
    run(output, sampling=SamplingConfig(temperature=0))
    run(output, sampling=SamplingConfig(temperature=0), seed=1)


@pytest.mark.parametrize("cut", [0, 1, 100, 500, 900])
def test_torn_file_is_completed_without_loss_or_repetition(output, cut):
    run(output, samples=2)
    whole = output.read_bytes()
    output.write_bytes(whole[:-cut] if cut else whole)
    missing = 12 - output.read_bytes().count(b"\n")
    backend = Scripted()
    report = run(output, backend, samples=2)
    assert len(backend.asked) == missing
    assert report.kept == 12
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_another_filter_judges_the_answers_again_without_asking(output):
    run(output, Scripted(lambda q: q.task.id))
    backend = Scripted()
    report = run(output, backend, filter=FilterConfig(regex="[135]"))
    assert backend.asked == []
    assert (report.kept, report.rejected) == (3, 3)
    assert {r["id"] for r in kept_rows(output)} == {"t1", "t3", "t5"}
    exact = FilterConfig(exact=True)
    for answers, kept in ((["t0", "t1"] * 3, ["t0", "t1"]), ([t.id for t in TASKS],) * 2):
        tasks = [task(number, answer) for number, answer in enumerate(answers)]
        run(output, backend, tasks=tasks, filter=exact)  # 答案变了，也要重新过滤
        assert [r["id"] for r in kept_rows(output)] == kept
    assert backend.asked == []


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def check(body):
        sys.modules.pop("my_check", None)
        Path("my_check.py").write_text(f"def keep(record, response):\n    {body}\n")
        return FilterConfig(function="my_check:keep")

    yield check
    sys.modules.pop("my_check", None)


def test_exception_in_a_filter_names_the_row_stops_and_loses_nothing(output, check):
    bad = check("return 1 / (record['bonus'] - 3) != 0")
    with pytest.raises(DistillabError) as caught:
        run(output, filter=bad)
    assert str(caught.value) == (
        f"synthesize.filter failed on the answer to 't3': ZeroDivisionError: division by zero; "
        f"4 of 6 answers are in {output}: run the same command again to continue"
    )
    assert [r["kept"] for r in rows(output)] == [True, True, True, None]
    time.sleep(0.01)  # 源文件的 mtime 要变，否则 import 用旧的字节码
    backend = Scripted()
    report = run(output, backend, filter=check("return record['bonus'] != 3  # repaired"))
    assert backend.asked == [("t4", 0), ("t5", 0)]
    assert (report.kept, report.rejected) == (5, 1)
    assert all(r["kept"] is not None for r in rows(output))


def test_refusals_come_before_the_first_question(output):
    backend = Scripted()
    with pytest.raises(DistillabError, match="but 1 of 2 records have none, such as 't9'"):
        run(output, backend, tasks=[task(1), task(9, None)], filter=FilterConfig(exact=True))
    with pytest.raises(DistillabError, match="the id 't1' names 2 tasks, expected one"):
        run(output, backend, tasks=[task(1), task(2), task(1)])
    with pytest.raises(DistillabError, match="nothing to ask"):
        run(output, backend, tasks=[])
    assert backend.asked == []
    assert not output.exists()


def test_error_of_the_backend_keeps_what_came_before_it(output):
    def broken(question):
        if question.task.id == "t4":
            raise DistillabError("the teacher is gone")
        return "4"

    with pytest.raises(DistillabError, match=r"^the teacher is gone; 4 of 6 answers are in"):
        run(output, Scripted(broken))
    assert len(rows(output)) == 4


def test_seed_of_a_question_depends_on_nothing_but_seed_id_and_sample():
    assert question_seed(0, "t0", 0) == 2043812906
    seeds = {question_seed(s, i, n) for s in range(3) for i in ("a", "b", "a1") for n in range(4)}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_nothing_is_drawn_without_a_terminal_and_the_bar_tells_the_rate_on_one(
    output, monkeypatch, capsys
):
    run(output)
    assert capsys.readouterr() == ("", "")
    from rich.console import Console

    with (output.parent / "screen").open("w+") as screen:
        console = Console(file=screen, force_terminal=True, width=100)
        monkeypatch.setattr(bars, "console", console)
        monkeypatch.setattr(bars.Progress, "stop", lambda bar: (bar.refresh(), bar.live.stop()))
        run(output.with_name("other.jsonl"), filter=FilterConfig(regex="4"))
        screen.seek(0)
        drawn = screen.read()
    assert "6/6" in drawn
    assert "answers/s" in drawn
    assert "kept 100%" in drawn


PROGRAM = """
import sys, time
from pathlib import Path
from tests.synthesize.test_synthesize import Scripted, run, task

def slow(question):
    time.sleep(0.01 if int(question.task.id[1:]) < 120 else 0.5)  # 等着被杀
    return "4 " * 50

run(Path(sys.argv[1]), Scripted(slow), tasks=[task(n) for n in range(200)])
"""


def start(output, rows_before_return):
    """在子进程里跑 ``PROGRAM``，等它写到这么多行。"""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(output)], stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < rows_before_return:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_run_killed_at_any_moment_is_completed_without_loss_or_repetition(output):
    for least in (1, 97):
        process = start(output, least)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert least <= output.read_bytes().count(b"\n") < 200
    kept = output.read_bytes()
    backend = Scripted(lambda q: "4 " * 50)
    run(output, backend, tasks=[task(n) for n in range(200)])
    assert output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert len(backend.asked) == 200 - kept.count(b"\n")
    assert Counter(r["id"] for r in rows(output)) == Counter(f"t{n}" for n in range(200))


@pytest.mark.slow
def test_ctrl_c_finishes_the_batch_and_keeps_everything(output):
    process = start(output, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"of 200 answers are in {output}" in err
    count = int(err.split("KeyboardInterrupt: stopped: ")[1].split(" of")[0])
    assert 20 <= count == output.read_bytes().count(b"\n") < 200
