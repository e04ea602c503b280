"""检查点只有完好的、自己的才被相信；别的都说得出，退到更早的一个。"""

import hashlib
import json
import logging
import os
import random
import shutil

import pytest
import torch
from pydantic import ValidationError
from test_trainer import Killed, die_after, losses, weights
from test_trainer import make as make
from test_trainer import teacher as teacher

from distillab.config.schema import TrainingConfig
from distillab.errors import DistillabError
from distillab.train import checkpoint_files
from distillab.train.checkpoint import load_student
from distillab.train.checkpoint_files import checkpoints, discard, tidy

OPTIONS = {"max_steps": 8, "save_interval": 3, "eval_interval": 2, "dropout": 0.1}


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def swap(path, name):
    shutil.copy(path.with_name("step-00000003") / name, path / name)


STATE = "trainer_state.json"
FILES = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
DAMAGES = {
    **{f"flipped {name}": (lambda p, n=name: flip(p / n, 8 * 3000 + 5)) for name in FILES},
    **{f"truncated {name}": (lambda p, n=name: truncate(p / n)) for name in (*FILES, STATE)},
    **{f"no {name}": (lambda p, n=name: (p / n).unlink()) for name in (*FILES, STATE)},
    **{f"another's {name}": (lambda p, n=name: swap(p, n)) for name in FILES},
    "a directory": lambda p: ((p / STATE).unlink(), (p / STATE).mkdir()),
    "one rank more": lambda p: shutil.copy(p / FILES[3], p / "random_states_1.pkl"),
    "a scaler": lambda p: torch.save({"scale": 2.0}, p / "scaler.pt"),
    "layout": lambda p: edit(p / STATE, lambda v: v["layout"].update(batch_size=2)),
    "no layout": lambda p: edit(p / STATE, lambda v: v.pop("layout")),
    "state": lambda p: edit(p / STATE, lambda v: v["state"].update(current_step=5)),
    "no digests": lambda p: edit(p / STATE, lambda v: v.pop("files")),
    "no digest of its own": lambda p: edit(p / STATE, lambda v: v.pop("sha256")),
    "deep": lambda p: (p / STATE).write_text("[" * 100_000),
    "not text": lambda p: (p / STATE).write_bytes(b"\xff\xfe{"),
}


@pytest.fixture
def cut(make):
    """没有中断的一次，与第 6 步存好之后被杀的一次。"""
    whole = make("whole", **OPTIONS)
    whole.train()
    first = make("parts", **OPTIONS)
    die_after(first, 6)
    with pytest.raises(Killed):
        first.train()
    return whole, first.run_dir


def test_every_kind_of_damage_falls_back_to_the_older_checkpoint_and_says_so(make, cut, caplog):
    whole, run = cut
    for number, (name, damage) in enumerate(DAMAGES.items()):
        copy = shutil.copytree(run, run.with_name(f"copy-{number}"))
        newest = checkpoints(copy / "checkpoints")[-1]
        assert newest.name == "step-00000006"
        damage(newest)
        caplog.clear()
        with caplog.at_level(logging.INFO, "distillab"):
            again = make(copy.name, **OPTIONS)
            again.train(resume=True)
        assert f"{newest}: " in caplog.text, name
        assert f"moved to {newest.with_name('damaged-step-00000006')}" in caplog.text, name
        assert "step-00000003 at step 3" in caplog.text, name
        assert torch.equal(weights(again), weights(whole)), name
        assert losses(again) == losses(whole), name


def test_a_flipped_bit_anywhere_never_trains_something_else(make, cut, caplog):
    whole, run = cut
    choose = random.Random(0)
    for number in range(12):
        copy = shutil.copytree(run, run.with_name(f"copy-{number}"))
        newest = checkpoints(copy / "checkpoints")[-1]
        file = newest / choose.choice((*FILES, STATE))
        flip(file, choose.randrange(8 * file.stat().st_size))
        with caplog.at_level(logging.INFO, "distillab"):
            again = make(copy.name, **OPTIONS)
            again.train(resume=True)
        assert f"{newest}: damaged checkpoint: {file.name}" in caplog.text
        assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("name", ["best", "step-00000006"])
def test_damaged_weights_are_not_loaded_into_a_student(make, cut, name):
    _, run = cut
    path = run / "checkpoints" / name
    student = make("other").student
    load_student(student, path)
    flip(path / "model.safetensors", 8 * 3000)
    with pytest.raises(DistillabError, match=f"{name}: damaged checkpoint: model.safetensors is"):
        load_student(student, path)


def old_format(path):
    """没有摘要、没有 id 的旧检查点。"""

    def change(values):
        del values["files"], values["sha256"], values["state"]["run"]

    edit(path / STATE, change)


def test_checkpoints_without_digests_or_id_still_resume(make, cut, caplog):
    whole, run = cut
    for path in (run / "checkpoints").iterdir():
        old_format(path)
    (run / "run_id").unlink()
    again = make("parts", **OPTIONS)
    with caplog.at_level(logging.INFO, "distillab"):
        again.train(resume=True)
    assert "step-00000006 at step 6" in caplog.text
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip(p / "optimizer.bin", 8 * 3000),  # zip 自己的 CRC
        lambda p: torch.save({"not": "random states"}, p / FILES[3]),
        lambda p: torch.save({"step": 0, "random_state": 1}, p / FILES[3]),
        lambda p: torch.save([1, 2], p / "optimizer.bin"),
        lambda p: torch.save(None, p / "scheduler.bin"),
        lambda p: edit(p / STATE, lambda v: v["state"].update(current_step="six")),
        lambda p: edit(p / STATE, lambda v: v["layout"].update(batch_size=None)),
        lambda p: edit(p / STATE, lambda v: v.update(state=[])),
    ],
)
def test_old_checkpoints_are_checked_as_far_as_they_can_be(make, cut, caplog, damage):
    whole, run = cut
    newest = checkpoints(run / "checkpoints")[-1]
    old_format(newest)
    damage(newest)
    again = make("parts", **OPTIONS)
    again.train(resume=True)
    assert f"{newest}: damaged checkpoint: " in caplog.text
    assert torch.equal(weights(again), weights(whole))


def test_the_second_damaged_checkpoint_of_a_step_finds_a_name(make, cut):
    _, run = cut
    (run / "checkpoints/damaged-step-00000006").mkdir()
    truncate(run / "checkpoints/step-00000006/optimizer.bin")
    make("parts", **OPTIONS).train(resume=True)
    assert (run / "checkpoints/damaged-step-00000006-2/optimizer.bin").exists()


# ---------------------------------------------------------------- 谁的


def test_checkpoint_of_another_run_is_refused_in_one_line(make, cut):
    whole, run = cut
    shutil.copytree(whole.checkpoint_dir / "step-00000008", run / "checkpoints/step-00000007")
    with pytest.raises(DistillabError, match="step-00000007: belongs to the run ") as caught:
        make("parts", **OPTIONS).train(resume=True)
    assert "\n" not in str(caught.value)
    assert (run / "run_id").read_text().strip() in str(caught.value)
    with pytest.raises(DistillabError, match="belongs to the run"):
        load_student(whole.student, whole.checkpoint_dir / "best", "f" * 32)


def test_the_id_stays_for_the_whole_run_and_is_in_each_checkpoint(make, cut):
    _, run = cut
    before = (run / "run_id").read_text()
    again = make("parts", **OPTIONS)
    again.train(resume=True)
    assert (run / "run_id").read_text() == before
    found = {
        json.loads((path / STATE).read_text())["state"]["run"]
        for path in again.checkpoint_dir.iterdir()
    }
    assert found == {before.strip()}


def test_an_id_that_is_none_is_refused(make, cut):
    _, run = cut
    (run / "run_id").write_bytes(b"\xff" * 100)
    with pytest.raises(DistillabError, match=r"run_id: expected the 32 hexadecimal digits of"):
        make("parts", **OPTIONS).train(resume=True)


def test_a_new_training_does_not_mix_with_the_checkpoints_of_an_earlier_one(make, cut):
    with pytest.raises(DistillabError, match="step-00000006 is of an earlier training"):
        make("parts", **OPTIONS).train()


@pytest.mark.parametrize(
    "name",
    ["/tmp/shared", "..", "../shared", "a/../../b", "C:\\shared", "..\\b", "\\b", "export", "checks/a"],
)  # fmt: skip
def test_checkpoint_dir_outside_the_run_is_refused(name):
    with pytest.raises(ValidationError, match=r"(leaves the run directory|keeps other files)"):
        TrainingConfig(checkpoint_dir=name)


def test_checkpoint_dir_may_be_any_place_inside(make):
    trainer = make(checkpoint_dir="deep/inside/")
    trainer.train()
    assert checkpoints(trainer.run_dir / "deep/inside")


def test_a_link_out_of_the_run_is_refused(make, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to("../shared")
    with pytest.raises(DistillabError, match=r"leads out of the run, to .*shared: link the whole"):
        make("run")
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    (tmp_path / "run/checkpoints").unlink()
    make("linked").train()  # 整个运行目录可以是一个链接
    assert checkpoints(tmp_path / "run/checkpoints")


# ---------------------------------------------------------------- 被杀留下的


def test_what_an_interrupted_run_left_is_swept_and_nothing_else(make, cut, caplog):
    caplog.set_level(logging.INFO, "distillab")
    _, run = cut
    directory = run / "checkpoints"
    kept = {".mine.tmp", "step-00000003", "step-00000006", "best", ".step-7.tmp", "notes.tmp"}
    left = {".step-00000007.tmp", ".best.tmp", ".step-00000001.old", ".best.old",
            ".step-00000007.0123456789ab.tmp", ".best.0123456789ab.tmp"}  # fmt: skip
    for name in (kept | left) - {"step-00000003", "step-00000006", "best"}:
        (directory / name).mkdir()
        (directory / name / "model.safetensors").write_bytes(b"half")
    outside = run / "outside"
    outside.mkdir()
    (directory / ".step-00000002.tmp").symlink_to(outside)
    tidy(directory)
    assert {path.name for path in directory.iterdir()} == kept
    assert outside.is_dir()
    assert ".best.tmp" in caplog.text
    make("parts", **OPTIONS).train(resume=True)
    shutil.rmtree(directory / ".mine.tmp")
    assert not [path for path in directory.iterdir() if path.name.startswith(".step-0")]


def test_best_is_there_whenever_its_replacement_is_killed(make, cut, monkeypatch):
    """每一次改名或删除之前被杀：清扫之后，``best`` 不是旧的就是新的。"""
    _, run = cut
    best, old = run / "checkpoints/best", run / "checkpoints/step-00000003"
    for moment in range(6):
        steps = iter(range(100))

        def or_die(act, steps=steps, moment=moment):
            def call(*arguments, **options):
                if next(steps) == moment:
                    raise Killed
                return act(*arguments, **options)

            return call

        new = shutil.copytree(old, run / "checkpoints/.best.tmp")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files.Path, "rename", or_die(checkpoint_files.Path.rename))
            patch.setattr(shutil, "rmtree", or_die(shutil.rmtree))
            try:
                checkpoint_files.publish(new, best)
                finished = True
            except Killed:
                finished = False
        tidy(best.parent)
        load_student(make("other").student, best)
        assert {p.name for p in best.parent.iterdir()} == {"best", "step-00000003", "step-00000006"}
    assert finished


def test_a_checkpoint_half_deleted_is_none(cut, monkeypatch):
    _, run = cut
    old = run / "checkpoints/step-00000003"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            discard(old)
    assert [path.name for path in checkpoints(old.parent)] == ["step-00000006"]


class Hostile:
    """一反序列化就在硬盘上留下痕迹。"""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def reseal(path):
    """摘要与 id 都对得上：给出整个运行目录的人做得到。"""

    def change(values):
        del values["sha256"]
        for name in FILES:
            content = (path / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            values["files"][name] = {"size": len(content), "sha256": digest}
        canonical = json.dumps(values, sort_keys=True).encode()
        values["sha256"] = hashlib.sha256(canonical).hexdigest()

    edit(path / STATE, change)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("vouch", [reseal, old_format])
def test_code_in_a_pickle_never_runs(make, cut, name, vouch, tmp_path, monkeypatch):
    _, run = cut
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    newest = run / "checkpoints" / "step-00000006"
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    mark = tmp_path / "ran"
    torch.save({"step": 0, "state": Hostile(mark)}, newest / name)
    vouch(newest)
    with pytest.raises(DistillabError, match="damaged checkpoint") as caught:
        make("parts", **OPTIONS).train(resume=True)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(newest / name, weights_only=False)  # 这个文件确实会
    assert mark.exists()
