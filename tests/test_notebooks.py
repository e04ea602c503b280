"""两本 notebook：只是调用本包，离线从头走到尾，而且真的画了图、写了字、留下文件。"""

import ast
import base64
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

from distillab.run_file_shapes import read_metrics

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ["main", "experience"]
ALLOWED = {"distillab", "torch", "transformers", "matplotlib", "IPython", "google"}
LONGEST_FUNCTION = 5


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def trees(name):
    return {cell.id: ast.parse(cell.source) for cell in code_cells(read(name))}


def nodes(name, *kinds):
    return [
        node for tree in trees(name).values() for node in ast.walk(tree) if isinstance(node, kinds)
    ]


def test_every_notebook_is_tested():
    assert sorted(NAMES) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_valid_and_its_cells_have_names_of_their_own(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell_id) for cell_id in ids)  # 不是随机的


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook_holds_no_output(name):
    for cell in code_cells(read(name)):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert set(cell.metadata) <= {"tags"}


@pytest.mark.parametrize("name", NAMES)
def test_one_cell_of_parameters_comes_before_all_other_code(name):
    cells = code_cells(read(name))
    assert [cell.id for cell in cells if "parameters" in cell.metadata.get("tags", [])] == [
        cells[0].id
    ]
    assert all(isinstance(line, ast.Assign) for line in ast.parse(cells[0].source).body)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_explained_in_chinese_and_asserts_what_it_promises(name):
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert len(re.findall(r"[\u4e00-\u9fff]", cell.source)) > 20, cell.id
    for cell_id, tree in trees(name).items():
        if cell_id != "parameters":
            assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), cell_id


@pytest.mark.parametrize("name", NAMES)
def test_notebook_imports_the_package_and_defines_nothing_of_its_own(name):
    imported = [alias.name for node in nodes(name, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes(name, ast.ImportFrom)]
    roots = {module.partition(".")[0] for module in imported}
    assert "distillab" in roots
    assert roots <= ALLOWED | sys.stdlib_module_names
    assert not nodes(name, ast.ClassDef)
    for function in nodes(name, ast.FunctionDef, ast.AsyncFunctionDef):
        assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name
    used = {node.attr for node in nodes(name, ast.Attribute)}
    assert not used & {"backward", "zero_grad", "Module", "AdamW"}  # 训练循环与模型都在包里


def test_main_notebook_has_the_eight_steps_in_order():
    notebook = read("main")
    steps = []
    for heading, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if found := re.match(r"## (\d)\. ", heading.source):
            assert cell.cell_type == "code"
            steps.append((int(found[1]), cell.id))
    assert steps == list(
        enumerate(
            ["environment", "imports", "data", "student", "teacher", "distillation", "generation",
             "saving"], 1,
        )
    )  # fmt: skip
    assert len(code_cells(notebook)) == 9  # 八格，外加参数


def run_notebook(name, directory, monkeypatch, **parameters):
    """照 papermill 的办法，在参数格之后插进另一些值；返回各格的输出，键是格子的 id。"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    notebook = read(name)
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    position = next(i for i, cell in enumerate(notebook.cells) if cell.id == "parameters")
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
    )  # fmt: skip
    client.execute()
    return {cell.id: cell.outputs for cell in code_cells(notebook)}


def text(outputs):
    printed = [output.text for output in outputs if output.output_type == "stream"]
    shown = [output.data.get("text/markdown", "") for output in outputs if "data" in output]
    return "".join(printed + shown)


def images(outputs):
    found = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode(image) for image in found]


@pytest.mark.slow
def test_main_notebook_runs_offline_from_top_to_bottom(
    tmp_path, monkeypatch, smollm2_dir, wiki_json
):
    tiny = ["data.size_mb=0.3", "data.max_seq_len=64", "train.max_steps=3", "train.warmup_steps=1",
            "train.log_interval=1", "train.eval_interval=3", "train.batch_size=1",
            "evaluate.max_sequences=4", "evaluate.max_new_tokens=8"]  # fmt: skip
    outputs = run_notebook("main", tmp_path, monkeypatch, SCALE="offline", OVERRIDES=tiny)

    assert "torch" in text(outputs["environment"])
    assert "81.4M" in text(outputs["student"])
    assert "` Paris`" in text(outputs["teacher"])
    assert "GiB" in text(outputs["teacher"])
    curves = images(outputs["distillation"])
    assert len(curves) == 1  # 随训练更新的是同一张
    assert curves[0].startswith(b"\x89PNG")
    for strategy in ("greedy", "top_k", "top_p"):
        assert text(outputs["generation"]).count(f"[{strategy}]") == 3

    run = tmp_path / "runs" / "notebook-offline"
    kinds = [row["kind"] for row in read_metrics(run / "metrics.jsonl")]
    assert kinds == ["reference", "reference", "train", "train", "train", "validation"]
    assert {path.name for path in (run / "plots").iterdir()} == {"loss.png", "perplexity.png"}
    assert (run / "summary.json").is_file()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "notebook-offline")
    assert saved.config.num_hidden_layers == 15


@pytest.mark.slow
def test_experience_notebook_runs_offline_from_top_to_bottom(
    tmp_path, monkeypatch, tiny_qwen2, tiny_tokenizer, wiki_json
):
    tiny_qwen2.config.max_position_embeddings = 2048
    tiny_qwen2.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    stand_in = [f"{side}.{key}" for side in ("teacher", "student")
                for key in ("path=model", "sha256=null")]  # fmt: skip
    # 随机的小模型不会答对，也要写很久才碰巧停下：留下它写完的一切。
    few = [*stand_in, "synthesize.filter=null", "synthesize.sampling.temperature=1",
           "synthesize.sampling.max_new_tokens=600", "evaluate.texts.wikipedia.max_seq_len=32"]  # fmt: skip
    outputs = run_notebook("experience", tmp_path, monkeypatch, SCALE="quick", OVERRIDES=few)

    assert "asked 12, kept" in text(outputs["synthesis"])
    assert len(images(outputs["training"])) == 3
    assert len(images(outputs["plot"])) == 1
    comparison = text(outputs["comparison"])
    answers = text(outputs["answers"])
    for method in ("SeqKD", "SKD", "GKD"):
        assert f"| {method} |" in comparison
        assert f" {method}：" in answers
        run = tmp_path / "runs" / f"notebook-{method.lower()}-quick"
        assert json.loads((run / "summary.json").read_text())["steps"] == 4
        assert (run / "export" / "model.safetensors").is_file()
    sampled = [row for row in read_metrics(tmp_path / "runs/notebook-gkd-quick/metrics.jsonl")
               if "rollout_responses" in row]  # fmt: skip
    assert sampled  # GKD 真的采样过
