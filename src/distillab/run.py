"""命令背后的流程：训练一份配方，导出、续写它的结果；评测在 ``evaluate/``。"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .assembly.parts import Parts, build_models, build_teacher
from .assembly.splits import Splits
from .assembly.student_vocabulary import saved_vocabulary, student_vocabulary
from .assembly.training import build_trainer
from .config.recipes import dump_recipe
from .config.run_dir import RUNS, RunDirectory, exported_model
from .config.schema import Recipe
from .config.sections import DataSection
from .config.style import USUAL, Style
from .data.chat import question_prompt, render_prompt, writes_date
from .data.pairs import Task, load_pairs
from .errors import DistillabError, typed_reason
from .evaluate.checks import (
    Checks,
    continued,
    load_tasks,
    merged,
    sample_prompts,
    whole_parts,
)
from .export.card import model_card
from .export.convert import export_student
from .figures import LABELS, RUN_MODELS
from .files import idle, leftovers, replace_file, sweep
from .generate.generator import TextGenerator
from .models.interface import PretrainedLM
from .models.pretrained import load_pretrained
from .models.tokenizer import load_tokenizer
from .report.curves import plot_run
from .report.page import write_report
from .run_file_shapes import read_metrics
from .synthesize.local_backend import LocalBackend
from .synthesize.questions import Backend
from .synthesize.response_file import ResponseFile
from .synthesize.server_backend import ServerBackend
from .synthesize.synthesize import SynthesisReport
from .synthesize.synthesize import synthesize as ask
from .terminal import main_process
from .train.checkpoint import load_student, save_best
from .train.checkpoint_files import BEST, DamagedCheckpoint, find_checkpoint, set_aside
from .train.loaders import StreamLoader
from .train.metrics import write_first
from .train.profiling import peak_memory_bytes, profiling
from .train.trainer import DistillationTrainer
from .train.validation import Metrics

logger = logging.getLogger("distillab")


def train(
    recipe: Recipe,
    resume: bool = False,
    *,
    parts: Parts | None = None,
    on_metrics: Callable[[Path], object] | None = None,
    profile: bool = False,
) -> tuple[RunDirectory, dict[str, Any]]:
    """走完一次训练：评测训练前、训练、再评测、生成样例、导出、画图、写 ``summary.json``。

    运行目录是 ``runs/<recipe.name>``；``resume`` 接着已有的来，已经走完的直接给出它的
    ``summary.json``。``parts`` 是刚装配好、没有训练过的模型，缺省为在这里装配；``on_metrics`` 见
    ``DistillationTrainer.train``；``profile`` 剖析前面的几步。Ctrl-C 与 SIGTERM 抛出时检查点已存。
    """
    with RunDirectory(RUNS / recipe.name) as run:
        recipe = run.keeping_choice(run.dated(recipe))
        if main_process():  # 只有它管理目录
            run.open(recipe, resume)
        if (done := run.summary) is not None:
            logger.info("%s is complete already", run.path)
            if not run.report.exists() and main_process():
                _report(run, done)
            return run, done
        splits = Splits(recipe)
        _ = splits.pairs  # 写错的数据不必等几十亿参数装好才发现
        tasks = load_tasks(recipe.evaluate, recipe.data)
        if parts is None:
            parts = build_models(
                recipe.student,
                recipe.teacher,
                recipe.train,
                splits,
                run.initial,
                across=recipe.loss.across,
                trimmed=student_vocabulary(recipe, splits, run.tokenizer),
            )
        if parts.initial is not None and main_process():
            run.write_initial(parts.initial)
        parameters = parts.parameters  # 分片之后就数不出来了
        counts = (f"{name} {n / 1e6:.1f}M" for name, n in parameters.items())
        logger.info("parameters: %s", ", ".join(counts))
        trainer = build_trainer(recipe, parts, run.path, splits)
        checks = Checks(recipe.evaluate.texts, tasks, parts, trainer, run.checks)
        main = trainer.accelerator.is_main_process
        if main and parts.trimmed is not None:
            parts.trimmed.copy_to(run.tokenizer)
        with trainer.watch, trainer.teacher or nullcontext():
            measured = _reference(run, trainer)
            before = checks.measure("student_before")
            with profiling(run.path / "profile" if profile and main else None):
                state = trainer.train(resume, on_metrics)
            best_step, measured["student_after"] = _load_best(run, trainer)
            checked = merged(before, checks.measure("student_after"))
        with whole_parts(parts, trainer, main) as parts:
            if not main:
                return run, {}
            metrics = {model: measured[model] for model in RUN_MODELS if model in measured}
            summary = {
                "name": recipe.name,
                **metrics,
                **checked,
                **_vocabulary(run, parts),
                "best_step": best_step,
                "steps": state.current_step,
                "skipped_steps": state.skipped_steps,
                "failed_rows": state.failed_rows,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 1),
                "tokens_per_second": round(state.tokens / (state.seconds or math.inf), 1),
                "peak_memory_bytes": peak_memory_bytes(),
                "parameters": parameters,
            }
            if isinstance(train_data := trainer.train_loader, StreamLoader):
                summary |= train_data.figures(state)
            if trainer.across.audit is not None:
                summary["alignment"] = trainer.across.audit
            if prompts := recipe.evaluate.prompts:
                asked = sample_prompts(recipe.evaluate, recipe.data, parts.tokenizer)
                texts = continued(parts.student, parts.tokenizer, asked, recipe.evaluate)
                lines = (
                    json.dumps({"prompt": prompt, "student": text}, ensure_ascii=False) + "\n"
                    for prompt, text in zip(prompts, texts, strict=True)
                )
                replace_file(run.samples_file, "".join(lines))
            shutil.rmtree(run.export, ignore_errors=True)
            _export(recipe, parts, run.export, state.tokens, metrics)
            plot_run(run.path)
            _report(run, summary)
            run.write_summary(summary)  # 它说的是「都走完了」，所以最后才写
    return run, summary


def synthesize(recipe: Recipe) -> SynthesisReport:
    """教师读着经验回答配方 ``data`` 的每个问题，写成 ``synthesize.output``（``data.responses`` 因而
    不读）；中断时答好的都已存下。
    """
    data, config = recipe.data, recipe.synthesize
    if not isinstance(data, DataSection):
        raise DistillabError(
            "data.mixture: one file of responses answers one source; give a recipe with that "
            "source alone, and name the file in its data.mixture entry: responses"
        )
    if data.format != "chat":
        raise DistillabError(f"data.format={data.format} has no questions; expected chat")
    pairs, notes = load_pairs(data.model_copy(update={"responses": None}), need_response=False)
    for note in notes:
        logger.info("%s", note)
    tasks = [pair.task("teacher") for pair in pairs]
    provenance: dict[str, Any] = {"recipe": recipe.name}
    if config.server is not None:
        backend: Backend = ServerBackend(config.server, config.sampling)
    else:
        if recipe.teacher is None:
            raise DistillabError("nobody can answer: set teacher.path, or synthesize.server")
        tokenizer, teacher = build_teacher(recipe.teacher, recipe.train.precision)
        provenance["teacher"] = {
            "path": recipe.teacher.path,
            "sha256": recipe.teacher.sha256,
            "dtype": str(teacher.head.weight.dtype).removeprefix("torch."),
            "template_options": data.template_options,
        }
        style = _synthesis_style(data.style, config.output, tokenizer, provenance["teacher"])

        def prompt(task: Task) -> list[int]:
            return render_prompt(task.messages, tokenizer, style.with_tools(task.tools))

        generator, name = TextGenerator(teacher, tokenizer), recipe.teacher.path
        backend = LocalBackend(generator, prompt, config.sampling, config.batch_size, name)
    return ask(
        tasks, backend, config, Path(config.output), provenance=provenance, seed=recipe.train.seed
    )


def _synthesis_style(
    style: Style, output: str, tokenizer: PreTrainedTokenizerBase, teacher: dict[str, Any]
) -> Style:
    """怎样渲染教师的 prompt；与缺省不同的记进来历，写日期的模板接着做时写的还是那一天。"""
    if style.control_tokens != USUAL.control_tokens:
        teacher["control_tokens"] = style.control_tokens
    if style.today is None and writes_date(tokenizer):
        before = ResponseFile(Path(output)).recorded("teacher", "today")
        with suppress(TypeError, ValueError):  # 还没有来历，或它不是我们写的
            style = style._replace(today=date.fromisoformat(before))
        style = style._replace(today=style.today or date.today())
    if style.today is not None:
        teacher["today"] = style.today.isoformat()
    return style


def export(name: str, checkpoint: str, output: Path | None, *, trust: bool = False) -> Path:
    """把一次运行的检查点（``best``、``last`` 或它的路径）导出成普通的 Hugging Face 目录，返回它；缺
    省写进运行目录的 ``export/``，须是空的，运行须没有正在训练。
    """
    run = RunDirectory.find(name)
    recipe = run.trusted_recipe(trust)
    path = find_checkpoint(run.checkpoint_dir(recipe), checkpoint)
    target = output or run.export
    if target.exists() and any(target.iterdir()):  # 先查，再花时间装配模型
        raise DistillabError(f"{target} exists already; name another directory with --output")
    with run:
        if output is None:  # 训练结束时也写这个目录
            run.lock()
        else:
            sweep(filter(idle, leftovers(target.parent, target.name)))
        parts = build_models(
            recipe.student,
            recipe.teacher,
            recipe.train,
            Splits(recipe),
            run.initial,
            across=recipe.loss.across,
            trimmed=saved_vocabulary(recipe.student.vocab, run.tokenizer),
        )
        state = load_student(parts.student, path)
        metrics, after = _recorded(run)
        if state.current_step in after:
            metrics["student_after"] = after[state.current_step]
        _export(recipe, parts, target, state.tokens, metrics)
    return target


def load_generator(name: str) -> TextGenerator:
    """由运行目录（用它的 ``export/``）或任意模型来源得到 ``TextGenerator``。"""
    source = exported_model(name)
    tokenizer = load_tokenizer(source)
    model = PretrainedLM(load_pretrained(source, dtype=torch.float32))
    if torch.cuda.is_available():
        model.to("cuda")
    return TextGenerator(model, tokenizer)


def chat_prompts(name: str, generator: TextGenerator, prompts: list[str]) -> list[list[int]]:
    """把每句话当作 user 消息，经 chat template 编码；运行目录的用它配方里的选项。"""
    try:
        style = RunDirectory.find(name).recipe.data.style
    except DistillabError:
        style = USUAL
    return [question_prompt(prompt, generator.tokenizer, style) for prompt in prompts]


def _recorded(run: RunDirectory) -> tuple[dict[str, Metrics], dict[int, Metrics]]:
    """``metrics.jsonl`` 里的成绩：训练前的各个模型，与各步的学生。"""
    reference: dict[str, Metrics] = {}
    validation: dict[int, Metrics] = {}
    losses = ("perplexity", "cross_entropy")  # 不是有限值的写成了 null
    for row in read_metrics(run.metrics_file):
        if not row.keys() >= Metrics.__required_keys__:
            continue
        metrics: Any = {
            key: math.nan if row[key] is None and key.endswith(losses) else row[key]
            for key in row
            if key in Metrics.__annotations__ or "/" in key  # 后者是各来源自己的
        }
        if row["kind"] == "reference":
            reference[row["model"]] = metrics
        elif row["kind"] == "validation":
            validation[row["step"]] = metrics
    return reference, validation


def _reference(run: RunDirectory, trainer: DistillationTrainer) -> dict[str, Metrics]:
    """训练前的成绩；恢复时从 ``metrics.jsonl`` 读回，不再算一遍。"""
    known, _ = _recorded(run)
    if known.keys() >= {"student_before"} | ({"teacher"} if trainer.teacher is not None else set()):
        if trainer.teacher is not None:
            trainer.teacher.measured_outside()  # 上次量过了
        return known
    logger.info("evaluating before training")
    student, teacher = trainer.evaluate()
    outside = _outside(trainer)
    reference = {"student_before": student}
    if teacher is not None:
        reference["teacher"] = teacher
    if trainer.accelerator.is_main_process:
        rows = [{"kind": "reference", "step": 0, "model": m, **reference[m]} for m in reference]
        rows[-1] |= {} if outside is None else {"outside": outside}  # 教师的在最后
        write_first(run.metrics_file, rows)
    for model, metrics in reference.items():
        logger.info("%s: perplexity %s", LABELS[model].short, f"{metrics['perplexity']:,.1f}")
    return reference


def _outside(trainer: DistillationTrainer) -> float | None:
    """教师在验证集上平均每个 token 给了词表之外多少概率；没有裁剪词表是 ``None``。"""
    teacher = trainer.teacher
    sums = None if teacher is None else teacher.measured_outside()
    if teacher is None or sums is None:
        return None
    accelerator = trainer.accelerator
    mass, tokens = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    if not tokens:  # 教师的分布都是存下的，没有再问它
        return None
    done = "renormalised" if teacher.outside is None else "moved to their first piece"
    logger.info(
        f"the teacher gives {mass / tokens:.3%} of its probability to tokens outside the "
        f"student's vocabulary: {done}"
    )
    return float(mass / tokens)


def _vocabulary(run: RunDirectory, parts: Parts) -> dict[str, Any]:
    """``summary.json`` 的 ``vocabulary``；没有裁剪则没有这一项。"""
    if parts.trimmed is None:
        return {}
    figures, rows = parts.trimmed.figures(), read_metrics(run.metrics_file)
    if lost := [row["outside"] for row in rows if "outside" in row]:
        figures["outside"] = lost[0]
    return {"vocabulary": figures}


def _load_best(run: RunDirectory, trainer: DistillationTrainer) -> tuple[int, Metrics]:
    """训练后的学生在哪一步，成绩如何：``best``；它损坏了就用最后一步的。所有进程都要调用。"""
    path, state, accelerator = trainer.checkpoint_dir / BEST, trainer.state, trainer.accelerator
    try:
        step = load_student(trainer.student, path, state.run, accelerator).current_step
    except DamagedCheckpoint as error:
        if accelerator.is_main_process:
            aside = f"moved to {set_aside(path)}; " if path.exists() else ""
            logger.warning("%s; %sthe last step takes its place", error, aside)
            for file in run.checks.glob("*.student_after.json*"):  # 考的是坏了的那个
                file.unlink()
        save_best(accelerator, trainer.module, path.parent, state, trainer.config)
        step = state.current_step
    return step, _recorded(run)[1].get(step) or trainer.evaluate()[0]


def _report(run: RunDirectory, summary: dict[str, Any]) -> None:
    """报告只是锦上添花：写不成也不该让走完的训练失败。"""
    try:
        write_report([run.path], run.report, summary=summary)
    except Exception as error:
        why = typed_reason(error)
        logger.warning("no report: %s; try: distillab report %s", why, run.path.name)


def _export(
    recipe: Recipe, parts: Parts, target: Path, tokens: int, metrics: dict[str, Metrics]
) -> None:
    card = model_card(
        name=recipe.name,
        recipe_yaml=dump_recipe(recipe, public=True),
        teacher=recipe.teacher.path if recipe.teacher else None,
        data=", ".join(source.source for source in recipe.data.sources),
        tokens=tokens,
        metrics=metrics,
    )
    export_student(parts.student, parts.tokenizer, target, vocabulary=parts.vocabulary, card=card)
    logger.info("exported to %s", target)
