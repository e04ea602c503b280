"""``benchmarks/gpu.py``：在 CPU 上以很小的形状走一遍每一段，连同挂住的与崩溃的；只起一次。"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """各个基准像脚本那样导入彼此。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_teacher_dir):
    """走完的一次：``(退出码, 输出, 记录, 合并到的目录)``。"""
    place = tmp_path_factory.mktemp("gpu")
    articles = {
        str(number): {"extract": f"{number} teachers give a student soft targets " * 8}
        for number in range(60)
    }
    (place / "text.json").write_text(json.dumps(articles))
    command = [
        sys.executable, str(HERE / "gpu_driver.py"), "--tiny", "--minutes", "6",
        "--json", str(place / "all.json"), "--results", str(place / "results"),
        "--smollm2", str(tiny_teacher_dir), "--text", str(place / "text.json"),
    ]  # fmt: skip
    found = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return found, json.loads((place / "all.json").read_text()), place / "results"


def of(records, section):
    return {
        (r["implementation"], r["case"]): r for r in records if r["section"] == section
    }  # fmt: skip


def test_every_section_gives_its_records_and_failures_are_told_by_the_exit_status(done):
    import gpu

    found, records, _ = done
    for section in gpu.SECTIONS:
        rows = of(records, section).values()
        if section in ("hangs", "crashes", "late", "needing"):
            continue
        assert any(r["status"] == "ok" for r in rows), f"{section}: {found.stdout[-3000:]}"
        assert not any(r["status"] == "failed" for r in rows), [*rows]
    assert found.returncode == 1  # 挂住的与崩溃的


def test_a_section_that_hangs_is_killed_with_its_children_and_keeps_what_it_said(done):
    _, records, _ = done
    rows = [r for r in records if r["section"] == "hangs"]
    assert [r["result"][:14] for r in rows] == ["kept", "over its limit"]
    assert not Path(f"/proc/{rows[0]['pid']}/status").exists()


def test_a_section_that_crashes_says_why_in_one_line_and_the_others_go_on(done):
    found, records, _ = done
    assert [r["result"] for r in records if r["section"] == "crashes"] == [
        "kept", "ValueError: on purpose"
    ]  # fmt: skip
    assert "crashes: FAILED: ValueError: on purpose" in found.stdout


def test_what_cannot_run_is_skipped_and_says_why(done):
    found, records, _ = done
    assert "late: SKIPPED: no time is left" in found.stdout.partition("=" * 80)[0]
    skipped = {r["section"]: r["result"] for r in records if r["status"] == "skipped"}
    assert skipped["late"] == "no time is left: raise --minutes"
    assert skipped["needing"] == "needs a_library_nobody_has"
    assert skipped["loss_head"] == "needs trl, which is not installed"
    assert skipped["train_step"] == "needs liger-kernel, which is not installed"
    assert skipped["engines"] == "needs deepspeed, which is not installed"


def test_the_step_is_measured_from_every_side(done):
    _, records, _ = done
    eager = of(records, "step")["eager", "case b tiny, 1 x 48 tokens, fp32"]
    assert eager["operators"] > 100
    assert eager["first_loss"] > eager["last_loss"] > 0
    assert 0 < eager["share"] < 1
    assert eager["tokens_per_second"] == pytest.approx(47 / eager["running_seconds"])
    assert eager["waits"] == {}


def test_the_table_fits_80_columns_and_names_the_machine(done):
    import torch

    found, _, _ = done
    table = found.stdout[found.stdout.index("=" * 80) :].splitlines()
    assert max(map(len, table)) == 80
    assert any(f"torch {torch.__version__}" in line for line in table)
    assert " ok, 2 failed, " in table[-1]


def test_records_of_another_card_are_kept(done, tmp_path):
    import gpu

    _, records, results = done
    written = json.loads((results / "loss_head-gpu.json").read_text())
    assert {r["status"] for r in written} == {"ok"}
    assert {r["implementation"] for r in written} >= {"floor", "distillab", "dense"}
    fresh = [r for r in records if r["section"] == "sampling"]
    for card, speed in (("A", 1.0), ("B", 2.0), ("A", 3.0)):
        rows = [r | {"tokens_per_second": speed} for r in fresh]
        gpu.keep(rows, {"device_name": card}, tmp_path)
    merged = json.loads((tmp_path / "sampling-gpu.json").read_text())
    assert len(merged) == 2 * len(fresh)
    assert {(r["device_name"], r["tokens_per_second"]) for r in merged} == {("A", 3.0), ("B", 2.0)}


def test_without_a_gpu_only_tiny_shapes_run(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(gpu, "preload", lambda: "cpu")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device was found; --tiny tries")


def test_a_trace_is_summed_up_without_counting_overlaps_twice():
    from gpu_step import TRACE, TRACED, summary

    def event(category, name, start, length):
        return {"cat": category, "name": name, "ts": start, "dur": length}

    found = summary(
        [
            event("kernel", "mm", 0.0, 30.0), event("kernel", "add", 20.0, 20.0),
            event("gpu_memcpy", "Memcpy DtoH", 100.0, 5.0),
            event("gpu_user_annotation", "Optimizer.step", 0.0, 500.0),
            event("cuda_runtime", "cudaLaunchKernel", 0.0, 1.0),
            event("cuda_runtime", "cudaGraphLaunch", 0.0, 1.0),
            event("cuda_runtime", "cudaStreamSynchronize", 0.0, 1.0),
            event("cpu_op", "aten::mm", 0.0, 1.0),
        ]
    )  # fmt: skip
    assert found["device_seconds"] == pytest.approx(45e-6 / TRACED)
    assert found["kernels"] == pytest.approx(2 / TRACED)
    assert found["launches"] == pytest.approx(2 / TRACED)
    assert found["graphs"] == pytest.approx(1 / TRACED)
    assert found["host_waits"] == pytest.approx(1 / TRACED)
    assert found["operators"] == pytest.approx(1 / TRACED)
    assert found.keys() == set(TRACE)
    assert [row["name"] for row in found["top_kernels"]] == ["mm", "add", "Memcpy DtoH"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_workers_take_turns_and_what_is_done_is_given_before_what_hangs():
    """各进程把轮到自己的时刻写下来。"""
    import time

    from gpu_processes import in_turn
    from measuring import open_channel, send

    def works(failing=None, hanging=None):
        channel = open_channel()
        for turn, _ in enumerate(["", *"123"]):
            if turn > 0:
                sys.stdin.readline()
            if turn == failing:
                raise ValueError("on purpose")
            time.sleep(600 if turn == hanging else 0.02)
            send(channel, {"turn": turn, "at": time.monotonic()})

    calls = {
        "a": works, "late": lambda: time.sleep(2.5) or works(), "broken": lambda: works(failing=2),
        "b": works, "hung": lambda: works(hanging=3),
    }  # fmt: skip
    found = {}
    for name, first, rest in in_turn(calls, time.monotonic() + 3, rounds=2, warm_up=1):
        found[name] = first, [report["turn"] for report in rest]
        if name != "broken":
            times = [report["at"] for report in rest]
            assert times == sorted(times)
        if {"a", "b", "broken"} <= found.keys():
            break  # hung 还挂着，late 还没有热身好
    assert found["broken"] == ({"failed": "ValueError: on purpose"}, [])
    assert found["a"][1] == found["b"][1] == [2, 3]
    assert "late" not in found


def test_a_finished_recipe_is_told_in_one_line():
    from gpu_runs import said

    scores = {"teacher": 0.9, "student_before": 0.0, "student_after": 0.8, "gap_closed": None}
    summary = {
        "student_after": {"perplexity": 11.8}, "teacher": {"perplexity": 1.7},
        "tasks": {"handbook": scores}, "seconds": 40.2, "tokens_per_second": 1234.5,
        "peak_memory_bytes": 2**31, "synthesis_seconds": 9.0, "wall_seconds": 61.0,
    }  # fmt: skip
    assert said(summary) == (
        "synthesis 9 s; 61 s in all, training 40 s; 1,234 tokens/s; perplexity 11.8 (teacher 1.7); "
        "peak 2.00 GiB; handbook 0% -> 80% (teacher 90%)"
    )


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    from gpu_step import operations
    from train_step_models import Cell

    cell = Cell("b", "full", 8, 512, "bf16", 0.5, "cuda", 0)
    assert operations(cell) / 1e12 == pytest.approx(7.25, abs=0.005)


def test_what_a_training_step_imports_is_what_the_script_asks_for():
    from gpu_work import NEEDS

    waiting, seen, others = ["train.trainer", "generate.generator", "export.convert"], set(), set()
    while waiting:
        if (module := waiting.pop()) in seen or not (path := source(module)).exists():
            continue
        seen.add(module)
        for node in ast.parse(path.read_text()).body:  # 函数里的导入用到才算
            if isinstance(node, ast.Import):
                others |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                package = module.split(".")[:-1]
                start = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                waiting += [".".join(start), *(".".join([*start, a.name]) for a in node.names)]
            elif isinstance(node, ast.ImportFrom):
                others.add(node.module.partition(".")[0])
    others -= {*sys.stdlib_module_names, "pydantic_core"}
    assert "loss.fused" in seen
    assert others | {"transformers"} == set(NEEDS)


def source(module):
    return HERE.parents[1].joinpath("src", "distillab", *module.split(".")).with_suffix(".py")
