"""怎样切批、往哪边填充、谁先谁后、几个进程、中途被杀：SKD 与 on-policy 每一步的数都不变。"""

import json
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distillab.data.chat_dataset import LengthGroupedSampler
from distillab.run_file_shapes import read_metrics

COLOURS = ["red", "green", "blue", "black", "white"]
TASKS = 36
STEPS = 4

SKD = "loss.alpha=0.9"
ON_POLICY = "loss={divergence: jsd, alpha: 1.0}"
METHODS = {
    "skd": [SKD],
    **{
        f"gkd {fraction} {name}": [
            ON_POLICY,
            f"responses.student_fraction={fraction}",
            f"sampling.temperature={temperature}",
        ]
        for fraction in (1.0, 0.5)
        for name, temperature in (("greedy", 0.0), ("sampled", 0.9))
    },
}
GREEDY = [name for name in METHODS if "sampled" not in name]
ONLY_SAMPLED = [name for name in METHODS if "1.0" in name]


def split(batch_size, accumulation):
    return [
        f"train.batch_size={batch_size}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]


def options(overrides):
    return [part for override in overrides for part in ("--set", override)]


def task(number, *, experience, reply):
    """问题与回答都长短不一，批里才有 padding。"""
    colour = COLOURS[number * 7 % len(COLOURS)]
    system = [{"role": "system", "content": f"it is {colour}" + " indeed" * (number % 3)}]
    user = {"role": "user", "content": f"what{' is' * (number % 5)} {number}?"}
    answer = {"role": "assistant", "content": reply(number, colour)}
    return {"id": f"t{number}", "messages": [*system * experience, user, answer]}


def short(number, colour):
    return " ".join([colour] * (1 + number % 3))


def write_data(reply=short):
    for name, experience in (("plain.jsonl", False), ("knowing.jsonl", True)):
        rows = (task(number, experience=experience, reply=reply) for number in range(TASKS))
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def taught(workdir):
    """带与不带经验的两份任务；``recipe.yaml`` 里还没有方法。"""
    write_data()
    Path("recipe.yaml").write_text(
        "teacher: {path: teacher, dtype: float32}\n"
        "student: {path: teacher}\n"
        "data: {source: plain.jsonl, teacher_source: knowing.jsonl, format: chat}\n"
        "loss: {temperature: 1.0}\n"
        "sampling: {max_new_tokens: 6}\n"
        f"train: {{batch_size: 2, gradient_accumulation_steps: 4, max_steps: {STEPS},\n"
        "        num_epochs: 20, warmup_steps: 0, learning_rate: 1e-3, precision: fp32,\n"
        "        scheduler: constant, log_interval: 1, eval_interval: 100, save_interval: 100}\n"
    )
    return workdir


@pytest.fixture(scope="module")
def references():
    """``2 x 4`` 的一次训练是各种变化共同的对照，每个方法只走一遍。"""
    return {}


@pytest.fixture
def train(taught, command, references):
    def run(overrides):
        name = f"run-{len(list(Path('runs').glob('*')))}"
        code, _, err = command("train", "recipe.yaml", *options([*overrides, f"name={name}"]))
        assert code == 0, err
        return steps(name)

    def train(method, *overrides):
        if overrides:
            return run([*METHODS[method], *overrides])
        if method not in references:
            references[method] = run(METHODS[method])
        return references[method]

    return train


def steps(run):
    rows = read_metrics(Path("runs") / run / "metrics.jsonl")
    found = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return found


def assert_same(found, expected, rel=1e-5):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left["tokens"] == right["tokens"]
        for key in ("loss", "grad_norm"):
            assert right[key] > 1e-3
            assert left[key] == pytest.approx(right[key], rel=rel), (left["step"], key)


def test_methods_train_on_what_they_say(train):
    """下面比较的确实是五种不同的训练：采样的步采样，不采样的步不。"""
    sampled = {
        method: [row["step"] for row in train(method) if "rollout_responses" in row]
        for method in METHODS
    }
    every = list(range(1, STEPS + 1))
    assert sampled["skd"] == []
    for name in ("greedy", "sampled"):
        assert sampled[f"gkd 1.0 {name}"] == every
        assert 0 < len(sampled[f"gkd 0.5 {name}"]) < STEPS
    losses = {method: train(method)[0]["loss"] for method in METHODS}
    assert len(set(losses.values())) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(1, 8), (8, 1)], ids=["1x8", "8x1"])
def test_micro_batches_do_not_show(train, method, batch):
    expected = train(method)
    assert_same(train(method, *split(*batch)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_padding_side_does_not_show(train, method):
    expected = train(method)
    assert AutoTokenizer.from_pretrained("teacher").padding_side == "right"
    path = Path("teacher/tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained("teacher").padding_side == "left"
    assert_same(train(method, "description=left"), expected)


@pytest.mark.parametrize("method", GREEDY)
def test_order_inside_a_window_does_not_show(train, method, monkeypatch):
    """采样的种子按位置给，所以只比较贪心的。"""
    expected = train(method)
    forward = LengthGroupedSampler.__iter__
    seen = []

    def backward(self):
        order = list(forward(self))
        seen.append(order)
        for start in range(0, len(order), self.window):
            yield from reversed(order[start : start + self.window])

    monkeypatch.setattr(LengthGroupedSampler, "__iter__", backward)
    assert_same(train(method, "description=backward"), expected)
    assert seen


def longer(number, colour):
    return " ".join([colour] * (3 + number % 4))


def beyond_the_context(number, colour):
    return " ".join([colour] * (60 + number))


@pytest.mark.parametrize("method", ONLY_SAMPLED)
@pytest.mark.parametrize("reply", [longer, beyond_the_context])
def test_replies_of_the_data_do_not_show_when_every_response_is_sampled(train, method, reply):
    expected = train(method)
    write_data(reply)
    assert_same(train(method, "description=replies"), expected, rel=0)


def test_replies_of_the_data_do_not_cut_the_prompts_that_are_sampled_from(train):
    """没有经验时教师读的也只有问题：太长的回答会先挤掉问题，采样用的却必须是整个问题。"""
    alone = ["data.teacher_source=null", "student={path: null, init: {from: teacher, layers: 2}}"]
    expected = train("gkd 1.0 greedy", *alone)
    write_data(beyond_the_context)
    assert_same(train("gkd 1.0 greedy", *alone, "description=replies"), expected, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["skd", "gkd 1.0 sampled"])
def test_two_processes_give_the_steps_of_one(train, together, method):
    expected = train(method)
    together("train", "recipe.yaml", *options([*METHODS[method], *split(2, 2), "name=two"]))
    assert_same(steps("two"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gkd 0.5 sampled"])
def test_killed_on_policy_run_resumes_to_the_same_steps(start, command, taught, method):
    longer = [*METHODS[method], "train.max_steps=20", "train.save_interval=4", "name=run"]
    process = start("train", "recipe.yaml", *options(longer))
    metrics = Path("runs/run/metrics.jsonl")
    deadline = time.monotonic() + 240
    while max((row["step"] for row in read_metrics(metrics)), default=0) < 5:
        assert process.poll() is None, process.err.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, _, err = command("train", "recipe.yaml", *options(longer), "--resume")
    assert code == 0, err
    assert "resumed from" in err
    code, _, err = command("train", "recipe.yaml", *options([*longer, "name=whole"]))
    assert code == 0, err
    assert len(steps("run")) == 20
    assert_same(steps("run"), steps("whole"))
