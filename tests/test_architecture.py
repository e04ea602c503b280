"""导入只朝一个方向，重的库不进轻的模块，文件保持一题一个。"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "distillab"

ORDER = [
    "errors",
    "console",
    "bars",
    "parsing",
    "signals",
    "run_file_shapes",
    "files",
    "bootstrap",
    "credentials",
    "style",
    "data_config",
    "config",
    "shapes",
    "memory",
    "filters",
    "cache",
    "vocabulary",
    "targets",
    "batch",
    "sources",
    "recipes",
    "trust",
    "losses",
    "products",
    "row_loss",
    "sparse_rows",
    "agreement",
    "fused",
    "kv_cache",
    "head_fit",
    "abilities",
    "language_model",
    "model",
    "pretrained",
    "model_shapes",
    "hardware",
    "qwen_ranks",
    "tokenizer",
    "local_splits",
    "bad_rows",
    "spool",
    "articles",
    "encoding",
    "data",
    "streams",
    "forms",
    "rendering",
    "control_tokens",
    "template",
    "conversations",
    "turn_end",
    "chat",
    "stops",
    "truncate",
    "responses",
    "leaks",
    "paired",
    "questions",
    "response_file",
    "plan",
    "plan_table",
    "chat_data",
    "packing",
    "lora",
    "hf_layout",
    "convert",
    "card",
    "sharding",
    "optimizer_state",
    "teachers",
    "sampling",
    "sampling_weights",
    "generate",
    "likelihood",
    "rollout",
    "on_policy",
    "evaluate",
    "profiling",
    "compilation",
    "distillation_module",
    "metrics",
    "report_data",
    "report_measures",
    "report_tables",
    "report_charts",
    "report_page",
    "report",
    "evaluation_tables",
    "curves",
    "run_dir",
    "engine",
    "trainer_state",
    "layout",
    "checkpoint_files",
    "checkpoint",
    "progress",
    "synthesize",
    "local",
    "replies",
    "server",
    "generated",
    "choices",
    "tasks",
    "harness_lm",
    "harness",
    "skips",
    "loaders",
    "watch",
    "trainer",
    "left_out",
    "build",
    "build_training",
    "checks",
    "sequences",
    "subjects",
    "scoring",
    "figures",
    "evaluation",
    "run",
    "launch",
    "terminal",
    "cli",
]
"""每个模块只能导入排在它前面的。"""


def imported(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {(node.module or name.name) for node in nodes for name in node.names}
    return names - {"__version__"}


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    assert imported(module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ["losses", "row_loss", "sparse_rows", "fused"])
def test_objectives_take_tensors_and_know_no_model(module):
    assert not imported(module) & {"language_model", "model", "pretrained", "teachers"}


def test_recipe_files_are_read_by_the_run_directory_and_the_commands_alone():
    users = {module for module in ORDER if "recipes" in imported(module)}
    assert users == {"run_dir", "run", "cli"}


def test_help_needs_none_of_the_heavy_libraries():
    code = (
        "import sys, distillab.cli; "
        "heavy = {'torch', 'transformers', 'pydantic', 'matplotlib', 'plotly', 'jinja2', 'rich'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_report_reads_files_alone():
    code = (
        "import sys, distillab.report_page, distillab.report; "
        "heavy = {'torch', 'transformers', 'pydantic', 'matplotlib', 'plotly'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
