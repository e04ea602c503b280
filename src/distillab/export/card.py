"""导出目录里的 ``README.md``：这个模型由谁、用什么、怎样训练出来，成绩如何。"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures import LABELS


def model_card(
    name: str,
    recipe_yaml: str,
    teacher: str | None,
    data: str,
    tokens: int,
    metrics: Mapping[str, Mapping[str, Any]],
) -> str:
    """带 YAML front matter 的模型卡（Markdown）；``tokens`` 是训练过的 response token 数；
    ``metrics`` 是 ``LABELS`` 的键 → ``{指标名: 值}``，``None`` 的留空。
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # base_model 只收 hub id，写成本地路径会被 hub 拒收。
    is_hub_id = teacher is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", teacher)
    if teacher is not None and is_hub_id and not Path(teacher).exists():
        front["base_model"] = teacher
    front["tags"] = ["distillab", "knowledge-distillation"]
    # JSON 标量也是合法的 YAML，引号与转义不必另写一套。
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    origin = f"distilled from `{teacher}`" if teacher is not None else "trained without a teacher"
    lines += [
        f"# {name}",
        "",
        f"A causal language model {origin} on `{data}`: {tokens:,} training tokens.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "```",
        "",
    ]
    columns = list(
        dict.fromkeys(column for row in metrics.values() for column in row if "/" not in column)
    )
    if columns:
        lines += ["## Validation", "", f"| | {' | '.join(columns)} |"]
        lines += ["| --- " * (len(columns) + 1) + "|"]
        for key, label in LABELS.items():
            if key in metrics:
                values = (metrics[key].get(column) for column in columns)
                cells = ("" if value is None else f"{value:.4g}" for value in values)
                lines.append(f"| {label.card} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Recipe", "", "```yaml", recipe_yaml.strip(), "```", ""]
    return "\n".join(lines)
