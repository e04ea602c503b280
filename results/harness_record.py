"""用 lm-evaluation-harness 的一个任务量几个模型，写成一个 JSON；不要 hub。

python results/harness_record.py general_questions teacher=pypi:... student=runs/quickstart/export
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

from distillab.config.run_dir import environment
from distillab.config.sections import LmEvalConfig
from distillab.errors import DistillabError
from distillab.evaluate.bootstrap import mean_figure
from distillab.evaluate.harness import evaluate_with_harness

HERE = Path(__file__).parent / "harness"


def main() -> None:
    """命令行。"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", help="a task of results/harness, or one of the harness's own")
    parser.add_argument("model", nargs="+", metavar="NAME=SOURCE", help="any model source")
    options = parser.parse_args()
    config = LmEvalConfig(tasks=[options.task], include_path=str(HERE))
    found = {}
    try:
        for name, _, source in (model.partition("=") for model in options.model):
            task = evaluate_with_harness(source, None, config)["tasks"][options.task]
            found[name] = {"source": source, "items": task["items"]} | {
                metric: mean_figure(values) for metric, values in task["per_item"].items()
            }
            print(name, json.dumps(found[name]), flush=True)
    except DistillabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    content = {
        "task": options.task,
        "command": " ".join(["python", "results/harness_record.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "environment": environment(),
        "models": found,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (HERE / f"{options.task}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
