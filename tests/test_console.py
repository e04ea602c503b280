"""别人写的字符到了终端上只是字符：控制字符看得见，rich 的标记不起作用。"""

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from report_runs import evaluation, write_run
from rich.table import Table

from distillab import cli, console, terminal
from distillab.console import SafeFormatter, make_console, safe, say
from distillab.report.run_data import read_run
from distillab.report.terminal_tables import evaluation_tables, runs_table

PACKAGE = Path(cli.__file__).parent
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egpj.exe\u2066[/][bold red]x[/bold]\udc80"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egpj.exe\u2066[/][bold red]x[/bold]\udc80"
FORBIDDEN = "\x1b\x07\r\x9b\u202e\u2066\udc80"


def test_control_characters_are_shown_and_the_rest_stays():
    assert safe(HOSTILE) == SHOWN
    plain = "表\t格\n שלום \u200fעולם 👩\u200d🔬 e\u0301 [bold] \\x1b"
    assert safe(plain) == plain
    everything = "".join(map(chr, range(0x110000)))
    kept = safe(everything)
    for low, high in ((0, 9), (0xB, 0x20), (0x7F, 0xA0), (0x202A, 0x202F), (0x2066, 0x206A)):
        assert not set(map(chr, range(low, high))) & set(kept)
    kept.encode()


def test_what_is_said_reaches_its_stream_at_once(capsys):
    say(Path(HOSTILE[:-1]))
    say(HOSTILE, error=True, end="")
    out, err = capsys.readouterr()
    assert (out, err) == (SHOWN[:-6] + "\n", SHOWN)


def rendered(*things):
    screen = io.StringIO()
    shown = make_console(file=screen, width=200, force_terminal=False)
    for thing in things:
        shown.print(thing)
    return screen.getvalue()


def test_tables_show_names_as_they_are():
    table = Table(title=HOSTILE, caption=f"caption {HOSTILE}")
    table.add_column(f"column {HOSTILE}", footer=":smile:")
    table.add_row(HOSTILE)
    text = rendered(table, HOSTILE)
    assert text.count(SHOWN) == 5
    assert not set(text) & set(FORBIDDEN)


def test_a_run_and_a_model_may_be_named_like_markup(tmp_path):
    found = evaluation()
    found["models"]["[/]"] = {**found["models"]["teacher"], "label": "[/bold]"}
    validation = found["texts"]["validation"]["models"]
    validation["[/]"] = validation["teacher"]
    found["name"] = "[/x]"
    text = rendered(*evaluation_tables(found))
    assert "[/bold]" in text
    assert "[/x], best" in text
    run = write_run(tmp_path / "[" / "b]run")
    assert "b]run" in rendered(runs_table([read_run(run)]))


def test_log_lines_are_shown_as_they_are(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "distillab.bars.console", make_console(file=screen, width=400, force_terminal=False)
    )
    logger = logging.getLogger("distillab")
    before = logger.handlers, logger.propagate, logger.level
    try:
        terminal.quiet_libraries()
        logger.warning("server said %s", HOSTILE)
        assert isinstance(logger.handlers[0].formatter, SafeFormatter)
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    assert f"server said {SHOWN}" in screen.getvalue()


def test_errors_and_samples_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distillab", "report", f"{HOSTILE[:-1]}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": HOSTILE, "student": HOSTILE}) + "\n")
    terminal.print_samples(samples)
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {SHOWN[:-6]}: not a run directory")
    assert out.startswith(f"> {SHOWN}{SHOWN}")
    assert not set(out + err) & set(FORBIDDEN)


def test_nothing_is_printed_but_through_the_console():
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "Console", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{path.stem}: {called}")
    assert found == [f"{Path(console.__file__).stem}: print"]
