"""报告读运行目录：缺什么、写到一半、几次并排，都读得出该有的数。"""

import io
import json
import math

import pytest
from plotly.graph_objects import Figure
from report_runs import INJECTION, write_run
from rich.console import Console

from distillab.errors import DistillabError
from distillab.parsing import differing
from distillab.report.charts import (
    MAX_POINTS,
    agreement_charts,
    axes,
    curve_charts,
    optimisation_charts,
    rollout_charts,
    task_charts,
    thinned,
)
from distillab.report.measures import headline, measures
from distillab.report.page import page, watch_report, write_report
from distillab.report.run_data import read_run, read_runs
from distillab.report.tables import answers, costs, initial_layers, method, results, samples
from distillab.report.terminal_tables import runs_table


@pytest.fixture
def kd(tmp_path):
    return write_run(tmp_path / "kd", evaluated=True, rollouts=True)


@pytest.fixture
def ce(tmp_path):
    return write_run(tmp_path / "ce", alpha=0.0, scale=1.6)


def test_evaluation_takes_the_place_of_what_training_measured(kd):
    found = measures(read_run(kd))
    assert found["perplexity", "validation"].values["student_after"] == {
        "value": 41.5, "low": 41.5 * 0.98, "high": 41.5 * 1.02,
    }  # fmt: skip
    assert found["accuracy", "arithmetic"].value("student_after") == 0.6
    (kd / "evaluation.json").unlink()
    found = measures(read_run(kd))
    assert found["accuracy", "arithmetic"].value("student_after") == 0.5
    assert found["accuracy", "arithmetic"].values["student_after"]["low"] is None


def test_tasks_of_the_harness_are_rows_of_the_page_with_their_own_metrics(kd):
    found = measures(read_run(kd))["lm_eval", "tiny_choose acc,none"]
    assert found.value("teacher") == 0.625
    assert found.values["student_after"]["high"] == 0.5 * 1.02
    shown = page(read_runs([kd]))
    assert "lm-eval tiny_choose, acc,none of 7" in shown
    assert "0.625" in shown


def test_a_model_with_another_tokenizer_agrees_with_nobody(kd):
    found = json.loads((kd / "evaluation.json").read_text())
    found["agreement"]["validation"]["stranger"] = None
    (kd / "evaluation.json").write_text(json.dumps(found))
    measured = measures(read_run(kd))["forward_kl", "validation"]
    assert set(measured.values) == {"student_before", "student_after"}
    assert page(read_runs([kd]))


def test_the_layers_that_a_student_began_with_stand_beside_their_scores(kd, ce):
    record = {"source": "teacher", "choose": "influence", "total": 3, "layers": [0, 2],
              "scores": [1.0, 0.0123, 0.25], "tokens": 8192}  # fmt: skip
    (kd / "initial.json").write_text(json.dumps(record))
    record |= {"kept": {"channels": [1, 2], "heads": [[0]], "kv_heads": [[[0, 1]]],
                        "neurons": [[0, 3, 4]], "shares": {"channels": 0.954, "heads": 1.0}},
               "choose": "greedy", "layers": [0], "scores": [], "removed": [2, 1],
               "losses": [3.5, 4.25], "tokens": 1024}  # fmt: skip
    (ce / "initial.json").write_text(json.dumps(record))
    found = initial_layers(read_runs([kd, ce]))
    said = [[(cell["kept"], cell["said"]) for cell in row] for row in found["rows"]]
    assert said == [
        [(True, "1.0000"), (True, "")],
        [(False, "0.0123"), (False, "removed 2: 4.250")],
        [(True, "0.2500"), (False, "removed 1: 3.500")],
    ]
    assert found["notes"][0] == (
        "2 layers of the 3 of the teacher, by block influence on 8,192 training tokens"
    )
    assert found["notes"][1].endswith(
        "; 2 channels, in each layer 3 neurons, 1 heads and 1 key/value heads: 95% of the "
        "channels' activations"
    )
    shown = page(read_runs([kd, ce]))
    assert "Where the student started" in shown
    assert "✓ 1.0000" in shown
    (kd / "initial.json").unlink()
    (ce / "initial.json").unlink()
    assert "Where the student started" not in page(read_runs([kd, ce]))


def test_gap_closed_of_perplexity_is_in_nats(ce):
    measure = measures(read_run(ce))["perplexity", "validation"]
    before, after, teacher = (
        math.log(measure.value(model)) for model in ("student_before", "student_after", "teacher")
    )
    assert measure.gap["value"] == pytest.approx((before - after) / (before - teacher), rel=1e-12)


def test_gap_closed_of_a_task_is_none_when_the_teacher_is_no_better(ce):
    summary = json.loads((ce / "summary.json").read_text())
    summary["tasks"]["arithmetic"]["teacher"] = 0.2
    (ce / "summary.json").write_text(json.dumps(summary))
    assert measures(read_run(ce))["accuracy", "arithmetic"].gap is None


def test_a_run_in_progress_is_read_up_to_its_half_written_line(ce):
    (ce / "summary.json").unlink()
    lines = (ce / "metrics.jsonl").read_text().splitlines()
    (ce / "metrics.jsonl").write_text("\n".join(lines[:9]) + '\n{"kind": "train", "st')
    run = read_run(ce)
    assert not run.complete
    assert run.state == "step 50 of 100"
    validated = [row for row in run.rows if row["kind"] == "validation"]
    assert measures(run)["perplexity", "validation"].value("student_after") == min(
        row["perplexity"] for row in validated
    )
    assert costs(run)["tokens"] == 50_000
    assert "step 50 of 100" in page([run])


def test_only_recipe_and_metrics_are_needed_and_metrics_may_be_empty(tmp_path, ce):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_text((ce / "recipe.yaml").read_text())
    (bare / "metrics.jsonl").touch()
    run = read_run(bare)
    assert run.state == "empty"
    assert headline([run]) is None
    html = page([run])
    assert "Nothing measured yet" in html
    assert len(html) < 50_000  # 没有图就不带绘图的脚本
    assert page([run, read_run(ce)])


def test_a_damaged_file_is_named_in_one_line(ce):
    (ce / "summary.json").write_text("{")
    with pytest.raises(DistillabError) as error:
        read_run(ce)
    assert str(error.value).startswith(f"{ce}/summary.json: not valid JSON")


def test_numbers_that_are_not_finite_never_reach_the_page(ce):
    text = (ce / "metrics.jsonl").read_text().replace("900.0", "Infinity")
    (ce / "metrics.jsonl").write_text(
        text + '{"kind": "train", "step": 101, "tokens": 9, "loss": NaN, "divergence": null, '
        '"cross_entropy": NaN}\n'
    )
    assert read_run(ce).train[-1]["loss"] is None
    html = page([read_run(ce)])
    assert "NaN" not in html.split('id="library"')[0]
    assert "Infinity" not in html.split('id="library"')[0]


def test_a_key_in_an_old_recipe_never_reaches_the_page(ce):
    key, file = "sk-0123456789abcdef", ce / "recipe.yaml"
    server = (
        f"{{base_url: 'https://u:pass@host/v1?k=abc', extra_body: {{user: {key}, token: def9}}}}"
    )
    assert "{source: text.jsonl" in read_run(ce).recipe_text  # 没有密钥的原样显示
    file.write_text(f"{file.read_text()}synthesize: {{server: {server}}}\n")
    text = page([read_run(ce)])
    assert "https://host/v1" in text
    assert not any(secret in text for secret in (key, "pass@", "k=abc", "def9"))


def test_runs_compare_with_the_first(kd, ce):
    runs = read_runs([kd, ce, kd])
    assert [run.label for run in runs] == ["kd", "ce"]
    group = next(g for g in results(runs)["groups"] if g["label"] == "perplexity, validation")
    after = measures(runs[1])["perplexity", "validation"].value("student_after")
    assert [row["against"] for row in group["rows"]] == ["", f"{after / 41.5 - 1:+.1%}"]
    assert differing([run.recipe for run in runs]) == [
        ("name", ["kd", "ce"]), ("loss.alpha", [0.5, 0.0]),
    ]  # fmt: skip
    assert dict(method(runs[1]))["objective"] == "cross-entropy"
    assert dict(method(runs[0]))["objective"] == "0.5 forward_kl (T 2) + 0.5 cross-entropy"


def test_an_empty_mapping_is_a_value_where_a_page_shows_it():
    values = [{"a": {}, "b": 1}, {"a": {"c": 2}, "b": 1}]
    assert differing(values) == [("a.c", [None, 2])]
    assert differing(values, empty=True) == [("a", [{}, None]), ("a.c", [None, 2])]


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    paths = [write_run(tmp_path / parent / "same") for parent in "ab"]
    assert [run.label for run in read_runs(paths)] == [str(path) for path in paths]


def test_samples_of_one_prompt_stand_side_by_side(kd, ce):
    single = samples(read_runs([kd]))
    assert single[0]["texts"] == {
        "teacher": "upon a time", "student before": "xx xx",
        "student after": f"upon {INJECTION}",
    }  # fmt: skip
    both = {sample["prompt"]: sample["texts"] for sample in samples(read_runs([kd, ce]))}
    assert both["The sea"] == {"ce": " is blue"}


def test_answers_are_sorted_by_what_training_changed(kd):
    (task,) = answers(read_runs([kd]))
    assert task["counts"] == {"learned": 1, "still wrong": 2, "kept": 1}
    learned = task["items"][0]
    assert learned["question"] == "1 + 1?"
    assert [row["correct"] for row in learned["texts"].values()] == [True, False, True]


def test_every_chart_is_valid_plotly_and_skips_what_was_never_measured(kd, ce):
    runs = read_runs([kd, ce])
    found = [chart for make in (curve_charts, task_charts, agreement_charts, rollout_charts,
                                optimisation_charts) for chart in make(runs)]  # fmt: skip
    assert len(found) == 4 + 1 + 4 + 3 + 4
    for chart in found:
        assert Figure(data=chart["data"], layout=chart["layout"]).data
    assert not rollout_charts(read_runs([ce]))
    assert not agreement_charts(read_runs([ce]))


def test_bars_of_what_runs_share_are_drawn_once(kd, ce, tmp_path):
    runs = read_runs([kd, ce, write_run(tmp_path / "again", evaluated=True)])
    (chart,) = task_charts(runs)
    assert [(trace["name"], trace["y"]) for trace in chart["data"]] == [
        ("teacher", [0.75]), ("student before", [0.25]), ("student after, kd", [0.6]),
        ("student after, ce", [0.5]), ("student after, again", [0.6]),
    ]  # fmt: skip


def test_one_colour_per_run_in_every_chart(kd, ce):
    for chart in curve_charts(read_runs([kd, ce])) + optimisation_charts(read_runs([kd, ce])):
        shades = {trace["name"]: trace["line"]["color"] for trace in chart["data"]}
        assert shades["kd"] == "#3b82f6"
        assert shades["ce"] == "#d97706"


def test_long_runs_are_thinned_and_keep_their_last_row():
    rows = [{"step": step} for step in range(10 * MAX_POINTS + 7)]
    kept = thinned(rows)
    assert len(kept) <= MAX_POINTS + 1
    assert kept[0] == rows[0]
    assert kept[-1] == rows[-1]
    assert thinned([]) == []
    assert thinned(rows[:5]) == rows[:5]


def test_curves_and_their_axes_have_the_same_length(kd):
    runs = read_runs([kd])
    lengths = {key: len(columns["step"]) for key, columns in axes(runs).items()}
    for chart in curve_charts(runs):
        for trace in chart["data"]:
            assert len(trace["y"]) == lengths[trace["meta"]["axis"]]


def test_watching_rewrites_when_files_change_and_ends_with_the_run(ce, monkeypatch):
    summary = (ce / "summary.json").read_text()
    (ce / "summary.json").unlink()
    written, naps = [], []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:  # 前两次什么也没变
            (ce / "summary.json").write_text(summary)

    monkeypatch.setattr("distillab.report.page.time.sleep", nap)
    watch_report([ce], None, 7, lambda path: written.append(path.read_text()))
    assert naps == [7, 7, 7]
    assert ['data-reload="7000"' in html for html in written] == [True, False]


def test_interrupted_watching_leaves_a_page_that_does_not_reload(ce, monkeypatch):
    (ce / "summary.json").unlink()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("distillab.report.page.time.sleep", interrupt)
    watch_report([ce], None, 7, lambda _: None)
    assert "data-reload" not in (ce / "report.html").read_text().split("<script>")[0]


def test_the_page_of_several_runs_lies_beside_them(kd, ce, tmp_path):
    assert write_report([kd, ce])[0] == tmp_path / "report.html"
    assert write_report([kd])[0] == kd / "report.html"
    assert (kd / "report.html").stat().st_size < 3_000_000


def test_list_of_runs_fits_a_terminal(kd, ce, tmp_path):
    (ce / "summary.json").unlink()
    long = write_run(tmp_path / "a-run-with-a-rather-long-name-that-says-it-all")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(runs_table(read_runs([kd, ce, long])))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "900→41.5" in text
    assert "25%→60%" in text
    assert "step 100 of" in text
    assert "…" not in text
