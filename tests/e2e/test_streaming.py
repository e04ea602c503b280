"""从配方训练一个流：几个进程与一个进程同样的步，被杀之后接着走的步也一样。"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import Hub

from distillab.run_file_shapes import read_metrics

STREAM = ["data.streaming=true", "data.shuffle_buffer=20", "train.eval_interval=100"]


def options(overrides):
    return [part for override in overrides for part in ("--set", override)]


def steps(run):
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "train"]


def assert_same(found, expected, rel):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left["step"] == right["step"]
        assert left["tokens"] == right["tokens"]
        for key in ("loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=rel), (left["step"], key)


@pytest.fixture
def shards(workdir):
    """三个大小不一的文件：两个进程分不匀。"""
    lines = Path("text.jsonl").read_text().splitlines(keepends=True)
    Path("shards").mkdir()
    for number, (start, end) in enumerate([(0, 5), (5, 45), (45, 60)]):
        Path(f"shards/{number}.jsonl").write_text("".join(lines[start:end]))
    recipe = Path("recipe.yaml").read_text()
    Path("recipe.yaml").write_text(recipe.replace("text.jsonl", "shards"))
    return workdir


@pytest.fixture
def train(shards, command):
    def train(name, *overrides, resume=False):
        arguments = options([*STREAM, *overrides, f"name={name}"]) + ["--resume"] * resume
        code, _, err = command("train", "recipe.yaml", *arguments)
        assert code == 0, err
        return err

    return train


def test_micro_batches_of_a_stream_do_not_show(train):
    train("whole")
    train("split", "train.batch_size=1", "train.gradient_accumulation_steps=4")
    assert_same(steps("split"), steps("whole"), 1e-5)


def test_a_stream_goes_on_after_its_end_and_validates_on_what_it_left_out(train):
    log = train("long", "data.size_mb=0.005", "train.max_steps=50", "train.save_interval=100")
    assert "streaming the training text" in log
    rows = steps("long")
    assert rows[-1]["epoch"] > 0
    validation = [
        row for row in read_metrics(Path("runs/long/metrics.jsonl")) if row["kind"] == "validation"
    ]
    assert validation


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_steps(train, start):
    longer = [*STREAM, "train.max_steps=40", "train.save_interval=4", "name=run"]
    process = start("train", "recipe.yaml", *options(longer))
    metrics = Path("runs/run/metrics.jsonl")
    deadline = time.monotonic() + 400
    while max((row["step"] for row in read_metrics(metrics)), default=0) < 9:
        assert process.poll() is None, process.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    log = train("run", *longer[3:-1], resume=True)
    assert "resumed from" in log
    train("whole", *longer[3:-1])
    assert_same(steps("run"), steps("whole"), 1e-6)


@pytest.mark.slow
def test_two_processes_read_one_stream_and_any_number_resumes_it(train, together):
    train("one", "train.max_steps=16")
    shared = [*STREAM, "train.batch_size=2", "train.save_interval=8", "name=two"]
    together("train", "recipe.yaml", *options([*shared, "train.max_steps=16"]))
    assert_same(steps("two"), steps("one"), 1e-5)
    states = sorted(Path("runs/two/checkpoints").glob("step-*/trainer_state.json"))
    alone = json.loads(states[-1].read_text())["state"]["stream"]
    train("saved", "train.max_steps=16", "train.save_interval=8")
    again = sorted(Path("runs/saved/checkpoints").glob("step-*/trainer_state.json"))
    assert alone == json.loads(again[-1].read_text())["state"]["stream"]


def test_a_stream_of_changed_data_is_not_resumed(train, command):
    train("run", "train.max_steps=4", "train.save_interval=4")
    shutil.rmtree("runs/run/export")
    Path("runs/run/summary.json").unlink()
    with Path("shards/1.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    code, _, err = command(
        "train", "recipe.yaml", "--resume",
        *options([*STREAM, "train.max_steps=4", "train.save_interval=4", "name=run"]),
    )  # fmt: skip
    assert code == 2
    assert "the training data differs" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_steps=null"], "data.streaming=true needs train.max_steps: a stream has no"),
        (["data.format=chat"], "streaming and format=chat disagree"),
    ],
)
def test_streams_that_make_no_sense_are_refused_in_one_line(shards, command, overrides, message):
    code, _, err = command("train", "recipe.yaml", *options([*STREAM, *overrides]))
    assert code == 2
    assert message in " ".join(err.split())


# ---------------------------------------------------------------------- hub


@pytest.fixture
def hub(shards):
    """教师与三个分片都在一个 hub 上；分片在一个 subset 里。"""
    articles, teacher = Path("hub/datasets/acme/articles"), Path("hub/models/acme/teacher")
    shutil.copytree("teacher", teacher)
    for number in range(3):
        name = f"train-0000{number}-of-00003.jsonl"
        (articles / "2023.zh").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"shards/{number}.jsonl", articles / "2023.zh" / name)
    (articles / "README.md").write_text(
        "---\nconfigs:\n- config_name: 2023.zh\n  data_files:\n  - split: train\n"
        "    path: 2023.zh/train-*\n---\n"
    )
    with Hub(Path("hub")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_stream_and_a_model_from_a_hub_train_as_those_on_disk_do_and_resume(train, hub):
    def from_hub(*resume):
        overrides = options(
            [*STREAM, "name=remote", "teacher.path=acme/teacher", "data.source=acme/articles",
             "data.subset=2023.zh"]
        )  # fmt: skip
        environment = {key: os.environ[key] for key in os.environ if "proxy" not in key.lower()}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": "hf", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "distillab", "train", "recipe.yaml", *overrides, *resume]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    train("local")
    from_hub()
    expected = steps("local")
    assert_same(steps("remote"), expected, rel=1e-6)
    Path("runs/remote/summary.json").unlink()
    for path in Path("runs/remote/checkpoints").glob("step-*"):
        if int(path.name[-8:]) > 8:
            shutil.rmtree(path)
    assert "at step 8" in " ".join(from_hub("--resume").split())
    assert_same(steps("remote"), expected, rel=1e-6)
    read = [path.rpartition("/")[-1] for _, path in hub.asked]
    assert {f"train-0000{number}-of-00003.jsonl" for number in range(3)} <= set(read)
