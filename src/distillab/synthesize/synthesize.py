"""教师回答每一个任务，写成训练用的 ``responses.jsonl``（``distillab synthesize``）。

谁来回答由 ``Backend`` 决定：``local_backend.py`` 的模型，或 ``server_backend.py`` 的服务。
这里管其余的事：哪些还没有答过、留下哪些、一批一批落盘、报告。
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bars import make_bar
from ..config.sections import SynthesizeConfig
from ..data.pairs import Task
from ..errors import DistillabError, typed_reason
from ..signals import StopRequest
from .filters import Filter, make_filter, needs_answer
from .questions import TOO_LONG, Answer, Backend, Question, Unanswered, check_tasks
from .response_file import ResponseFile

logger = logging.getLogger("distillab")


@dataclass
class SynthesisReport:
    """一次 ``synthesize`` 的结果；除了速度，数的都是整个文件，与中断过几次无关。"""

    output: Path
    asked: int  # 任务数乘以每个任务的回答数
    kept: int = 0
    rejected: int = 0  # 过滤掉的，与空白的
    truncated: int = 0  # 到 max_new_tokens 被截断的，留下与否都算
    too_long: int = 0  # 提示放不进教师上下文的
    tokens: int = 0
    new_tokens: int = 0  # 这一次得到的
    seconds: float = 0.0  # 这一次用的
    failures: Counter[str] = field(default_factory=Counter)  # 没有答成的原因；再运行就会再问

    @property
    def answered(self) -> int:
        """文件里的行数。"""
        return self.kept + self.rejected + self.too_long

    @property
    def failed(self) -> int:
        """没有答成的个数。"""
        return self.failures.total()

    @property
    def exit_code(self) -> int:
        """0 为全部答完；1 为还有没答成的。"""
        return 1 if self.failed else 0

    def count(self, row: Mapping[str, Any]) -> None:
        """计入文件里的一行。"""
        if row["finish_reason"] == TOO_LONG:
            self.too_long += 1
        elif row["kept"]:
            self.kept += 1
        else:
            self.rejected += 1
        self.truncated += row["finish_reason"] == "length"
        self.tokens += row["tokens"] or 0

    def __str__(self) -> str:
        share, speed = self.kept / max(self.answered, 1), self.new_tokens / (self.seconds or 1)
        lines = [
            f"asked {self.asked:,}, kept {self.kept:,} ({share:.0%} of the answers), "
            f"rejected {self.rejected:,}, failed {self.failed:,}",
            f"{self.tokens:,} tokens; {speed:,.0f} tokens/s",
        ]
        if self.truncated:
            lines.append(
                f"{self.truncated:,} answers were cut off: raise sampling.max_new_tokens, or "
                f"leave them out by finish_reason"
            )
        if self.too_long:
            lines.append(f"{self.too_long:,} prompts do not fit into the teacher's context")
        if self.failed:
            reasons = ", ".join(f"{n:,} x {reason}" for reason, n in self.failures.most_common(3))
            lines.append(
                f"{self.failed:,} are unanswered ({reasons}); "
                f"run the same command again to ask only those"
            )
        return "\n".join(lines)


def synthesize(
    tasks: Sequence[Task],
    backend: Backend,
    config: SynthesizeConfig,
    output: Path,
    *,
    provenance: Mapping[str, Any],
    seed: int,
) -> SynthesisReport:
    """让教师回答每个任务 ``config.samples`` 次，过滤，写进 ``output``；已有的回答不再问。

    每行一个回答，过滤掉的也在；``kept`` 为 null 表示过滤函数出了错、还没有判断，接着做时会补上。旁
    边的来历里，除 ``recipe`` 以外的键接着做时都必须不变。任务或过滤有误，来历对不上，过滤函数出错，
    或教师没法继续，就是 ``DistillabError``；那时与 Ctrl-C 时，答好的都已存下。
    """
    judge = make_filter(config.filter)
    check_tasks(tasks, "synthesize.filter" if needs_answer(config.filter) else None)
    report = SynthesisReport(output, asked=len(tasks) * config.samples)
    prompts = {
        task.id: _sha256(task.messages if task.tools is None else [task.messages, task.tools])
        for task in tasks
    }
    with ResponseFile(output) as file:
        rows = file.resume({**provenance, **_provenance(tasks, prompts, backend, config, seed)})
        if rows:
            logger.info("%s: %d of %d answers are there already", output, len(rows), report.asked)
        if file.filter_changed or any(row["kept"] is None for row in rows):
            by_id = {task.id: task for task in tasks}
            for row in rows:
                row["kept"] = _keep(judge, by_id[row["id"]], row)
            file.rewrite(rows)
        for row in rows:
            report.count(row)
        done = {(row["id"], row["sample"]) for row in rows}
        pending = [
            Question(task, sample, question_seed(seed, task.id, sample))
            for task in tasks
            for sample in range(config.samples)
            if (task.id, sample) not in done
        ]
        if pending:
            _ask(pending, backend, judge, prompts, file, report)
    return report


def question_seed(seed: int, task_id: str, sample: int) -> int:
    """一个问题的种子，31 位：与问题的先后、分批都无关。"""
    return int(_sha256([seed, task_id, sample])[:8], 16) >> 1


def _ask(
    pending: Sequence[Question],
    backend: Backend,
    judge: Filter,
    prompts: Mapping[str, str],
    file: ResponseFile,
    report: SynthesisReport,
) -> None:
    problem: DistillabError | None = None
    started = time.perf_counter()
    before = report.answered
    with StopRequest() as stop, make_bar() as bar:
        shown = bar.add_task("synthesize", total=report.asked, completed=before, status="starting")
        batches = backend.answer(pending, lambda: stop.requested or problem is not None)
        try:
            for batch in batches:
                answers = [outcome for outcome in batch if isinstance(outcome, Answer)]
                rows = [_row(answer, prompts) for answer in answers]
                try:
                    for answer, row in zip(answers, rows, strict=True):
                        if problem is None:
                            row["kept"] = _keep(judge, answer.question.task, row)
                except DistillabError as error:
                    problem = error  # 请教师停下，但它手上已有的回答照收
                finally:
                    file.append(rows)  # 没来得及判断的也存：回答比判断贵
                for row in rows:
                    report.count(row)
                    report.new_tokens += row["tokens"] or 0
                report.failures.update(o.reason for o in batch if isinstance(o, Unanswered))
                report.seconds = time.perf_counter() - started
                rate = (report.answered - before) / report.seconds
                share = report.kept / max(report.answered, 1)
                speed = report.new_tokens / report.seconds
                status = f"{rate:.1f} answers/s  {speed:,.0f} tok/s  kept {share:.0%}"
                status += f"  failed {report.failed:,}" if report.failed else ""
                bar.update(shown, completed=report.answered, status=status)
        except DistillabError as error:
            problem = problem or error
        finally:
            batches.close()  # 第二次 Ctrl-C：不等回收，马上取消途中的请求
    saved = f"{report.answered:,} of {report.asked:,} answers are in {report.output}"
    if problem is not None:
        raise DistillabError(f"{problem}; {saved}: run the same command again to continue")
    if stop.requested and report.answered < report.asked:
        raise stop.stopped(f"stopped: {saved}")


def _keep(judge: Filter, task: Task, row: Mapping[str, Any]) -> bool:
    response: str = row["response"]
    if not response.strip():  # 放不进上下文的，与一开口就停下的：没有可学的 token
        return False
    try:
        return judge(task.record, task.answer, response)
    except Exception as error:  # 使用者的函数可能抛出任何异常
        raise DistillabError(
            f"synthesize.filter failed on the answer to {task.id!r}: {typed_reason(error)}"
        ) from error


def _row(answer: Answer, prompts: Mapping[str, str]) -> dict[str, Any]:
    task = answer.question.task
    row = {
        "id": task.id,
        "sample": answer.question.sample,
        "response": answer.response,
        "kept": None,
        "finish_reason": answer.finish_reason,
        "model": answer.model,
        "seed": answer.seed,
        "prompt_sha256": prompts[task.id],
        "tokens": answer.tokens,
    }
    also = {"error": answer.error, "reasoning": answer.reasoning}
    return row | {key: value for key, value in also.items() if value is not None}


def _provenance(
    tasks: Sequence[Task],
    prompts: Mapping[str, str],
    backend: Backend,
    config: SynthesizeConfig,
    seed: int,
) -> dict[str, Any]:
    judged: dict[str, Any] | None = None
    if config.filter is not None:
        records = sorted((task.id, _sha256([task.answer, task.record])) for task in tasks)
        judged = {**config.filter.model_dump(), "records_sha256": _sha256(records)}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("distillab", "torch", "transformers", "openai")},
        "backend": backend.describe(),
        "sampling": config.sampling.model_dump(),
        "samples": config.samples,
        "seed": seed if config.sampling.temperature > 0 else None,  # 贪心用不到它
        "prompts_sha256": _sha256(sorted(prompts.items())),
        "filter": judged,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
