"""报告的一页在真的浏览器里：画得出，数与文件相同，离线，两种配色，手机上不横向滚动。"""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from report_runs import INJECTION, evaluation, write_run

from distillab.report.page import write_report
from distillab.run_file_shapes import read_metrics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    def __init__(self, browser, file, width=1200, scheme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def traces(self, chart):
        return self.page.evaluate(
            "key => document.getElementById('chart-' + key).data"
            ".map(t => ({name: t.name, x: [...t.x], y: [...t.y]}))", chart
        )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "kd", evaluated=True, rollouts=True),
            write_run(root / "ce", alpha=0.0, scale=1.6)]  # fmt: skip


@pytest.fixture(scope="module")
def opened(browser, runs):
    return Opened(browser, write_report(runs)[0])


@needs_browser
def test_page_says_nothing_and_asks_for_nothing(opened, runs):
    assert opened.said == []
    assert opened.asked == [(runs[0].parent / "report.html").as_uri()]


@needs_browser
def test_curves_hold_the_values_of_the_files_and_are_drawn(opened, runs):
    for chart, kind, column in (("loss", "train", "loss"), ("grad-norm", "train", "grad_norm"),
                                ("perplexity", "validation", "perplexity")):  # fmt: skip
        traces = {trace["name"]: trace for trace in opened.traces(chart)}
        for run in runs:
            rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind]
            expected = [row.get(column) for row in rows]
            if kind == "validation":  # 第 0 步是训练前
                expected = [900.0, *expected]
            assert traces[run.name]["y"] == expected
            assert traces[run.name]["x"][-1] == 100_000
    assert "teacher" in {trace["name"] for trace in opened.traces("perplexity")}
    drawn = opened.page.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => [c.dataset.chart, c.data.length,"
        " c.querySelectorAll('.scatterlayer .trace path, .barlayer .point path').length])"
    )
    assert len(drawn) == 16
    assert all(paths >= traces > 0 for _, traces, paths in drawn), drawn


@needs_browser
def test_hovering_shows_the_values_of_every_run(opened, runs):
    area = opened.page.locator("#chart-perplexity .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    opened.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    hover = opened.page.locator("#chart-perplexity .hoverlayer")
    hover.locator("text=teacher").wait_for()
    for run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        value = next(row["perplexity"] for row in rows
                     if row["kind"] == "validation" and row["step"] == 40)  # fmt: skip
        assert f"{run.name} : {value:.5g}" in hover.inner_html()


@needs_browser
def test_axis_switch_moves_every_training_curve(opened):
    opened.page.select_option("#axis", "seconds")
    assert opened.traces("loss")[0]["x"][-1] == 250.0
    assert opened.traces("perplexity")[0]["x"] == [0, 50, 100, 150, 200, 250]
    opened.page.select_option("#axis", "tokens")
    assert opened.traces("loss")[0]["x"][-1] == 100_000


@needs_browser
def test_table_holds_the_values_of_the_files(opened, runs):
    def cells(measure, run):
        row = opened.page.locator(f'#results tr[data-measure^="{measure}"][data-run="{run}"]').first
        return [float(value.get_attribute("data-value")) for value in row.locator(".value").all()]

    figures = evaluation()["texts"]["validation"]
    assert cells("perplexity, validation", "kd") == [
        figures["models"][model]["perplexity"]["value"]
        for model in ("teacher", "student_before", "student_after")
    ] + [figures["gap_closed"]["value"]]
    summary = json.loads((runs[1] / "summary.json").read_text())
    assert cells("perplexity, validation", "ce")[:3] == [
        summary[model]["perplexity"] for model in ("teacher", "student_before", "student_after")
    ]
    assert cells("arithmetic", "ce") == [0.75, 0.25, 0.5, 0.5]
    assert "40.67 – 42.33" in opened.page.locator("#results").inner_text()


@needs_browser
def test_text_of_the_run_stays_text(opened):
    assert opened.page.evaluate("window.injected") is None
    assert opened.page.locator("main img").count() == 0
    assert f"Once {INJECTION}" in opened.page.locator(".prompt").all_inner_texts()


@needs_browser
def test_theme_follows_the_system_until_it_is_chosen_and_charts_follow(opened):
    look = (
        "[getComputedStyle(document.body).backgroundColor,"
        " document.querySelector('#chart-loss .xtick text').style.fill]"
    )
    light = opened.page.evaluate(look)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"String({look}) !== {json.dumps(','.join(light))}")
    dark = opened.page.evaluate(look)
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    opened.page.click("#theme")
    assert opened.page.evaluate(look) == light
    opened.page.click("#theme")
    assert opened.page.evaluate(look) == dark


@needs_browser
def test_phone_never_scrolls_sideways(opened):
    opened.page.set_viewport_size({"width": 375, "height": 700})
    opened.page.wait_for_function(
        "[...document.querySelectorAll('.chart .main-svg')].every(svg => svg.clientWidth < 375)"
    )
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 375


@needs_browser
def test_page_of_a_run_in_progress_reloads_itself(browser, tmp_path):
    run = write_run(tmp_path / "live")
    summary = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    opened = Opened(browser, write_report([run], reload_seconds=3)[0])
    assert opened.page.locator(".badge").inner_text() == "step 100 of 100"
    (run / "summary.json").write_text(summary)
    write_report([run], reload_seconds=3)
    opened.page.wait_for_function("document.querySelector('.badge')?.innerText === 'complete'")


@needs_browser
def test_training_ends_with_a_report_of_its_own_numbers(command, browser):
    code, out, _ = command("train", "recipe.yaml")
    assert code == 0
    assert "report:  runs/recipe/report.html\n" in out
    code, out, _ = command("report", "recipe", "--output", "page.html")
    assert code == 0
    assert out.startswith("page.html (")
    opened = Opened(browser, Path("page.html").resolve())
    assert opened.said == []
    rows = read_metrics(Path("runs/recipe/metrics.jsonl"))
    assert opened.traces("loss")[0]["y"] == [row["loss"] for row in rows if row["kind"] == "train"]
    code, out, _ = command("runs")
    assert code == 0
    assert "recipe" in out
    assert "complete" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_report_that_cannot_be_written_does_not_fail_the_run(command, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distillab.run.write_report", broken)
    code, out, err = command("train", "recipe.yaml")
    assert code == 0
    assert "report:" not in out
    assert "no report: OSError" in err
    assert Path("runs/recipe/summary.json").exists()


def test_commands_name_the_run_that_is_not_there(command, workdir):
    assert command("runs")[:2] == (
        0, "no runs under runs/ yet; start one: distillab train quickstart\n",
    )  # fmt: skip
    code, _, err = command("report", "nope")
    assert code == 2
    assert err == "error: nope: not a run directory (no recipe.yaml)\n"
