"""坏数据的表：对话、成对、合成、on-policy，每种错误都只印一行、退出码 2，不写一半，不丢东西。"""

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stub_server import completion
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from distillab.run_file_shapes import read_metrics

TASKS = 12
EXPERIENCE = "all items here are red"
PLAIN, KNOWING, ANSWERS = "plain.jsonl", "knowing.jsonl", "answers.jsonl"

SET = "--set"
TRAIN = ("train", "recipe.yaml")
ALONE = (*TRAIN, SET, "data.teacher_source=null")
TOLD = (*ALONE, SET)
ANSWERED = (*TRAIN, SET, f"data.responses={ANSWERS}")
ON_POLICY = (*TRAIN, SET, "loss={divergence: jsd, alpha: 1.0}",
             SET, "responses.student_fraction=1.0")  # fmt: skip
SYNTHESIZE = ("synthesize", "recipe.yaml")
TASK = (*TRAIN, SET, "evaluate.tasks={colours: {source: plain.jsonl, "
        "teacher_source: knowing.jsonl, match: {exact: true}, max_new_tokens: 2}}")  # fmt: skip


def filtered(match):
    return (*SYNTHESIZE, SET, f"synthesize.filter={{{match}}}")


def conversation(number, *, experience, reply="red"):
    system = [{"role": "system", "content": EXPERIENCE}]
    turns = [{"role": "user", "content": f"colour of item {number}?"}]
    answer = [{"role": "assistant", "content": reply}]
    return {"id": f"t{number}", "messages": system * experience + turns + answer, "answer": "red"}


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


@pytest.fixture
def data(workdir, monkeypatch):
    """成对的两份任务、教师写好的回答，``recipe.yaml`` 是 SKD；每一样都是好的。"""
    write_rows(PLAIN, (conversation(n, experience=False) for n in range(TASKS)))
    write_rows(KNOWING, (conversation(n, experience=True) for n in range(TASKS)))
    write_rows(
        ANSWERS,
        ({"id": f"t{n}", "response": "red", "sample": 0, "kept": True, "finish_reason": "stop"}
         for n in range(TASKS)),
    )  # fmt: skip
    Path("lesson.txt").write_text(EXPERIENCE)
    config = json.loads(Path("teacher/config.json").read_text())
    config["max_position_embeddings"] = 128
    Path("teacher/config.json").write_text(json.dumps(config))
    Path("recipe.yaml").write_text(
        "teacher: {path: teacher}\n"
        "student: {path: teacher}\n"
        "data: {source: plain.jsonl, teacher_source: knowing.jsonl, format: chat}\n"
        "loss: {alpha: 0.9, temperature: 1.0}\n"
        "sampling: {max_new_tokens: 4}\n"
        "synthesize: {sampling: {temperature: 0.0, max_new_tokens: 4}}\n"
        "train: {batch_size: 2, max_steps: 2, warmup_steps: 0, log_interval: 1}\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield workdir
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


# ---------------------------------------------------------------------- 弄坏


def edit(name: str, change: Callable[[int, dict], dict | None]) -> Callable[[], None]:
    """逐条改写；``None`` 是去掉这一条。"""

    def prepare():
        rows = [change(number, row) for number, row in enumerate(read_rows(name))]
        write_rows(name, [row for row in rows if row is not None])

    return prepare


def turns(name: str, change: Callable[[list], list], only: int | None = None):
    return edit(
        name,
        lambda number, row: (
            {**row, "messages": change(row["messages"])} if only in (None, number) else row
        ),
    )


def system(name: str, text: str, only: int | None = None):
    message = {"role": "system", "content": text}
    return turns(name, lambda m: [message, *(t for t in m if t["role"] != "system")], only)


def write(name: str, text: str | bytes) -> Callable[[], None]:
    content = text.encode() if isinstance(text, str) else text
    return lambda: (Path(name).write_bytes(content), None)[1]


def line(name: str, number: int, text: str | bytes) -> Callable[[], None]:
    """换掉第 ``number`` 行（从 1 起）。"""

    def prepare():
        lines = Path(name).read_bytes().splitlines()
        lines[number - 1] = text.encode() if isinstance(text, str) else text
        Path(name).write_bytes(b"\n".join(lines) + b"\n")

    return prepare


def remove(name: str) -> Callable[[], None]:
    return lambda: Path(name).unlink()


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    def prepare():
        for step in steps:
            step()

    return prepare


def template(text: str | None) -> Callable[[], None]:
    def prepare():
        tokenizer = AutoTokenizer.from_pretrained("teacher")
        tokenizer.chat_template = text
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            Path("teacher", name).unlink(missing_ok=True)
        tokenizer.save_pretrained("teacher")

    return prepare


DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(text: str) -> Callable[[list], list]:
    return lambda messages: [*messages[:-1], {"role": "assistant", "content": text}]


def rename(number, row):
    return {**row, "id": f"u{number}"}


def without_id(number, row):
    return {key: value for key, value in row.items() if key != "id"} if number % 2 else row


def twice(number, row):
    return {**row, "id": "t0"} if number == 3 else row


def answer(**values):
    return edit(ANSWERS, lambda number, row: row | values)


def without_answer(name):
    return edit(name, lambda number, row: {k: v for k, v in row.items() if k != "answer"})


CHECKS = """
def keep(record, response):
    raise KeyError("shade")

def number(record, response):
    return 0.5
"""

# 名字：(命令, 弄坏, error: 之后的那一行)；CWD 是当前目录
CASES = {
    # ---- 对话
    "chat: no such file": ((*ALONE, SET, "data.source=./plane.jsonl"), None,
        "'./plane.jsonl' does not exist; did you mean 'plain.jsonl'?"),
    "chat: empty file": (ALONE, write(PLAIN, ""),
        "'plain.jsonl' is empty"),
    "chat: broken JSON": (ALONE, line(PLAIN, 5, '{"id": "t4", "messages": ['),
        "plain.jsonl:5: not valid JSON: Expecting value (column 27)"),
    "chat: not UTF-8": (ALONE, line(PLAIN, 2, b'{"id": "\xff\xfe"}'),
        "plain.jsonl:2 is not UTF-8 text; convert it first"),
    "chat: a list for an object": (ALONE, line(PLAIN, 2, "[1, 2]"),
        "plain.jsonl:2: expected an object holding a conversation, found list"),
    "chat: running text": (ALONE, line(PLAIN, 1, '{"text": "hello"}'),
        "plain.jsonl:1: found no conversation; its keys are text; expected messages (or "
        "conversations), prompt with completion, instruction with output, or text with '### "
        "Human:' and '### Assistant:' turns"),
    "chat: a .txt file": ((*ALONE, SET, "data.source=lesson.txt"), None,
        "'lesson.txt' is running text; expected .jsonl, .json or .parquet"),
    "chat: unknown role": (
        ALONE, turns(PLAIN, lambda m: [{**m[0], "role": "usr"}, *m[1:]], 2),
        "plain.jsonl:3: messages[0] has the unknown role 'usr'; did you mean 'user'?"),
    "chat: a number for content": (
        ALONE, turns(PLAIN, lambda m: [{**m[0], "content": 7}, *m[1:]], 2),
        "plain.jsonl:3: expected text in messages[0], found 7"),
    "chat: empty response": (
        ALONE, turns(PLAIN, lambda m: [*m[:-1], {**m[-1], "content": " "}], 1),
        "plain.jsonl:2: turn 2 of 2, an assistant's, is empty"),
    "chat: no assistant turn": (ALONE, turns(PLAIN, lambda m: m[:-1], 1),
        "plain.jsonl:2: found no assistant turn to train on, only user"),
    "chat: no user turn": (ALONE, turns(PLAIN, lambda m: m[-1:], 1),
        "plain.jsonl:2: found no user turn, only assistant"),
    "chat: ends with the user": (
        ALONE, turns(PLAIN, lambda m: [*m, m[0]], 1),
        "plain.jsonl:2: the last turn is the user's; expected the assistant's response"),
    "chat: tool calls": (
        ALONE, turns(PLAIN, lambda m: [m[0], {**m[1], "tool_calls": [{"name": "f"}]}], 1),
        "plain.jsonl:2: messages[1] has tool_calls, which is not supported; expected all of the "
        "turn in content"),
    "chat: one prompt": (ALONE, edit(PLAIN, lambda n, row: row if n == 0 else None),
        "plain.jsonl leaves 1 different prompts; expected at least 2, one for training and one "
        "for validation"),
    "chat: nothing fits": ((*ALONE, SET, "data.max_seq_len=4"), None,
        "plain.jsonl leaves 0 different prompts; expected at least 2, one for training and one "
        "for validation (dropped 12: too long for data.max_seq_len=4: no room for a response)"),
    "chat: fewer than a batch": ((*ALONE, SET, "train.batch_size=64"), None,
        "the training data has 11 sequences, fewer than one batch of train.batch_size=64 on 1 "
        "process(es)"),
    "chat: tokenizer without a template": (ALONE, template(None),
        "plain.jsonl:1: tokenizer 'teacher' has no chat template; use the tokenizer of an "
        "instruct model"),
    "chat: unknown template option": (
        (*ALONE, SET, "data.template_options={enable_thinkin: false}"), None,
        "plain.jsonl:1: template_options: the chat template reads no option 'enable_thinkin'; it "
        "has none"),
    # ---- 成对
    "paired: missing teacher file": (TRAIN, remove(KNOWING),
        "'knowing.jsonl' does not exist; did you mean 'plain.jsonl'?"),
    "paired: no common id": (TRAIN, edit(KNOWING, rename),
        "plain.jsonl and knowing.jsonl share no id: found 't0', 't1', 't2', ... in the first and "
        "'u0', 'u1', 'u2', ... in the second"),
    "paired: duplicate id": (TRAIN, edit(KNOWING, twice),
        "plain.jsonl and knowing.jsonl: duplicate id (1: 't0' at knowing.jsonl:4)"),
    "paired: some without id": (TRAIN, edit(PLAIN, without_id),
        "plain.jsonl:2: 6 of 12 conversations have no id; give all of them one, or none"),
    "paired: no response in either": (
        TRAIN, both(turns(PLAIN, lambda m: m[:-1], 3), turns(KNOWING, lambda m: m[:-1], 3)),
        "plain.jsonl and knowing.jsonl: no response in either file (1: 't3' at plain.jsonl:4)"),
    "paired: different questions": (
        TRAIN, turns(KNOWING, lambda m: [m[0], {**m[1], "content": "why?"}, m[2]], 4),
        "plain.jsonl and knowing.jsonl: the last user messages differ (1: 't4' at plain.jsonl:5)"),
    "paired: experience in the student's prompt": (
        TRAIN, both(system(PLAIN, f"Be brief.\n{EXPERIENCE}\nGo."),
                    system(KNOWING, f"{EXPERIENCE}\nBe kind.")),
        "plain.jsonl and knowing.jsonl: the student's prompt holds the experience (12: 't0' at "
        "plain.jsonl:1, 't1' at plain.jsonl:2, 't2' at plain.jsonl:3, ...)"),
    "paired: nothing more for the teacher": (TRAIN, turns(KNOWING, lambda m: m[1:]),
        "plain.jsonl and knowing.jsonl: the teacher's prompt holds nothing that the student's "
        "lacks (12: 't0' at knowing.jsonl:1, 't1' at knowing.jsonl:2, 't2' at knowing.jsonl:3, "
        "...)"),
    "paired: the same file twice": ((*TRAIN, SET, "data.teacher_source=plain.jsonl"), None,
        "plain.jsonl and plain.jsonl: the teacher's prompt holds nothing that the student's "
        "lacks (12: 't0' at plain.jsonl:1, 't1' at plain.jsonl:2, 't2' at plain.jsonl:3, ...)"),
    "paired: template that drops the system turn": (TRAIN, template(DROPS_SYSTEM),
        "plain.jsonl:1: the chat template drops or changes the system message 'all items here "
        "are red'; put it in the user message"),
    # ---- 一段经验
    "experience: missing file": ((*TOLD, "data.experience=lessons.txt"), None,
        "data.experience: 'lessons.txt' does not exist; expected a text file"),
    "experience: empty file": ((*TOLD, "data.experience=lesson.txt"), write("lesson.txt", "\n"),
        "data.experience: 'lesson.txt' is empty; expected what the teacher reads"),
    "experience: not text": ((*TOLD, "data.experience=lesson.txt"), write("lesson.txt", b"\xff\x00"),
        "data.experience: 'lesson.txt' is not UTF-8 text (invalid start byte)"),
    "experience: a directory": ((*TOLD, "data.experience=./teacher"), None,
        "'teacher' is a directory; expected a text file; it holds chat_template.jinja, "
        "config.json, generation_config.json, model.safetensors, tokenizer.json, ..."),
    "experience: empty": ((*TOLD, "data.experience=''"), None,
        "--set: data.experience: found '', expected at least 1 character"),
    "experience: blank": ((*TOLD, "data.experience=' '"), None,
        "data.experience: ' ' is empty; expected what the teacher reads"),
    "experience: in the student's prompt": (
        (*TOLD, "data.experience=lesson.txt"),
        system(PLAIN, EXPERIENCE, only=6),
        "plain.jsonl: the student's prompt holds the experience (1: 't6' at plain.jsonl:7)"),
    "experience: template without it": (
        (*TOLD, "data={experience: lesson.txt, experience_template: '{message}'}"), None,
        "--set: data: experience_template has no {experience}"),
    # ---- 教师写好的 response
    "responses: missing file": (ANSWERED, remove(ANSWERS),
        "data.responses: 'answers.jsonl' does not exist; write it with: distillab synthesize "
        "RECIPE"),
    "responses: empty file": (ANSWERED, write(ANSWERS, ""),
        "answers.jsonl answers none of the 12 tasks, such as 't0', 't1', 't2', ...; found it is "
        "empty"),
    "responses: broken JSON": (ANSWERED, line(ANSWERS, 12, '{"id": "t11", "resp'),
        "answers.jsonl line 12 is not a response: expected a JSON object with id, response"),
    "responses: no response": (ANSWERED, line(ANSWERS, 3, '{"id": "t2", "answer": "red"}'),
        "answers.jsonl line 3 is not a response: expected a JSON object with id, response"),
    "responses: a number": (ANSWERED, answer(response=3),
        "answers.jsonl line 1: expected text in response, found int"),
    "responses: unknown ids": (ANSWERED, edit(ANSWERS, rename),
        "answers.jsonl answers none of the 12 tasks, such as 't0', 't1', 't2', ...; found 12 "
        "responses to unknown ids: 'u0', 'u1', 'u2', ..."),
    "responses: all rejected": (ANSWERED, answer(kept=False),
        "answers.jsonl answers none of the 12 tasks, such as 't0', 't1', 't2', ...; found 12 "
        "rows that the filter rejected"),
    "responses: all cut off": (ANSWERED, answer(finish_reason="length"),
        "answers.jsonl answers none of the 12 tasks, such as 't0', 't1', 't2', ...; found 12 "
        "responses that were cut off while being generated"),
    "responses: all empty": (ANSWERED, answer(response=" "),
        "answers.jsonl answers none of the 12 tasks, such as 't0', 't1', 't2', ...; found 12 "
        "empty responses"),
    # ---- 任务
    "task: no such file": (
        (*TRAIN, SET, "evaluate.tasks={colours: {source: ./missing.jsonl, match: {exact: true}}}"),
        None,
        "evaluate.tasks.colours: './missing.jsonl' does not exist; did you mean "
        "'knowing.jsonl'?"),
    "task: no common id": (
        (*TRAIN, SET, "evaluate.tasks={colours: {source: plain.jsonl, teacher_source: other.jsonl, "
         "match: {exact: true}}}"),
        write("other.jsonl", json.dumps({"id": "u0", "prompt": "why?"})),
        "evaluate.tasks.colours: plain.jsonl and other.jsonl share no id: found 't0', 't1', "
        "'t2', ... in the first and 'u0' in the second"),
    "task: no answer to compare": (TASK, both(without_answer(PLAIN), without_answer(KNOWING)),
        "evaluate.tasks.colours: match compares with the record's answer, but 12 of 12 records have "
        "none, such as 't0'"),
    "task: no match": ((*TASK, SET, "evaluate.tasks.colours.match=null"), None,
        "--set: evaluate.tasks.colours: source needs match: exact, regex, function or choice"),
    "task: invalid regex": ((*TASK, SET, "evaluate.tasks.colours.match={exact: false, regex: '('}"), None,
        "evaluate.tasks.colours.match.regex '(' is not a regular expression: missing ), "
        "unterminated subpattern at position 0"),
    "task: prompt beyond the context": (
        (*TRAIN, SET, "evaluate.tasks={colours: {source: long.jsonl, match: {exact: true}}}"),
        write("long.jsonl", json.dumps({"prompt": "why? " * 200, "answer": "red"})),
        "evaluate.tasks.colours: long.jsonl:1: the teacher's prompt has 1017 tokens, expected "
        "fewer than its longest sequence 128"),
    # ---- 合成
    "synthesize: text data": (
        (*SYNTHESIZE, SET, "data={source: text.jsonl, format: text, teacher_source: null}"), None,
        "data.format=text has no questions; expected chat"),
    "synthesize: no teacher": (
        (*SYNTHESIZE, SET, "teacher=null", SET, "loss.alpha=0"), None,
        "nobody can answer: set teacher.path, or synthesize.server"),
    "synthesize: no common id": (SYNTHESIZE, edit(KNOWING, rename),
        "plain.jsonl and knowing.jsonl share no id: found 't0', 't1', 't2', ... in the first and "
        "'u0', 'u1', 'u2', ... in the second"),
    "synthesize: duplicate question": (
        (*SYNTHESIZE, SET, "data.teacher_source=null"), edit(PLAIN, twice),
        "the id 't0' names 2 tasks, expected one"),
    "synthesize: invalid regex": (filtered("regex: '[red'"), None,
        "synthesize.filter.regex '[red' is not a regular expression: unterminated character set "
        "at position 0"),
    "synthesize: two filters": (filtered("regex: red, exact: true"), None,
        "--set: synthesize.filter: set exactly one of exact, regex and function"),
    "synthesize: no such module": (filtered("function: 'my_filter:keep'"), None,
        "synthesize.filter.function 'my_filter:keep': cannot import my_filter from CWD or the "
        "installed modules: ModuleNotFoundError: No module named 'my_filter'"),
    "synthesize: no such function": (
        filtered("function: 'my_checks:kept'"), write("my_checks.py", CHECKS),
        "synthesize.filter.function 'my_checks:kept': my_checks has no function kept; did you "
        "mean 'keep'?"),
    "synthesize: no answer to compare": (
        filtered("exact: true"), both(without_answer(PLAIN), without_answer(KNOWING)),
        "synthesize.filter compares with the record's answer, but 12 of 12 records have none, "
        "such as 't0'"),
    "synthesize: somebody else's output": (
        (*SYNTHESIZE, SET, f"synthesize.output={ANSWERS}"), None,
        "answers.jsonl exists without answers.jsonl.provenance.json, so distillab synthesize did "
        "not write it; name another file with synthesize.output"),
    "synthesize: address with a key": (
        (*SYNTHESIZE, SET, "synthesize.server={base_url: 'http://me:sk-1@host/v1', model: m}"), None,
        "--set: synthesize.server.base_url holds a key, a token or a password: recipes are saved: "
        "put it into an environment variable and name that in api_key_env"),
    # ---- on-policy
    "on-policy: alpha below 1": ((*TRAIN, SET, "responses.student_fraction=0.5"), None,
        "recipe.yaml: responses.student_fraction=0.5 and loss.alpha=0.9 disagree: a sampled "
        "response is no label; set loss.alpha to 1"),
    "on-policy: text data": (
        (*ON_POLICY, SET, "data={source: text.jsonl, format: text, teacher_source: null}"), None,
        "recipe.yaml: responses.student_fraction=1 and data.format=text disagree: only chat data "
        "has prompts to sample from"),
    "on-policy: some without a response": (
        (*ON_POLICY, SET, "responses.student_fraction=0.5"),
        both(turns(PLAIN, lambda m: m[:-1], 3), turns(KNOWING, lambda m: m[:-1], 3)),
        "plain.jsonl and knowing.jsonl: no response in either file (1: 't3' at plain.jsonl:4)"),
    "on-policy: no prompt fits": ((*ON_POLICY, SET, "data.max_seq_len=4"), None,
        "plain.jsonl leaves 0 different prompts; expected at least 2, one for training and one "
        "for validation (dropped 12: too long for data.max_seq_len=4: no room for a response)"),
    # ---- 自相矛盾的键
    "keys: two kinds of experience": ((*TRAIN, SET, "data.experience=lesson.txt"), None,
        "--set: data: teacher_source and experience disagree: both give the teacher its "
        "experience; drop one"),
    "keys: experience for text": (
        (*TOLD, "data={source: text.jsonl, format: text, experience: lesson.txt}"), None,
        "--set: data: experience and format=text disagree: set format: chat"),
    "keys: a role without experience": ((*ALONE, SET, "data.experience_role=user"), None,
        "--set: data: experience_role says how experience is joined, but there is none"),
    "keys: top_k and top_p": ((*ON_POLICY, SET, "sampling={top_k: 5, top_p: 0.5}"), None,
        "--set: sampling: top_k and top_p disagree: set at most one of them"),
    "keys: samples of a greedy teacher": ((*SYNTHESIZE, SET, "synthesize.samples=4"), None,
        "--set: synthesize: samples=4 and sampling.temperature=0 disagree: greedy answers are "
        "all the same; set sampling.temperature"),
    "keys: fraction above 1": (
        (*TRAIN, SET, "responses.student_fraction=1.5", SET, "loss.alpha=1"), None,
        "--set: responses.student_fraction: found 1.5, expected less than or equal to 1"),
    # ---- LoRA
    "lora: no such layer": (
        (*TRAIN, SET, "student.lora={target_modules: [q_prj]}"), None,
        "student.lora.target_modules: no linear layer is named 'q_prj', did you mean 'q_proj'?"),
}  # fmt: skip

LEFT_BEHIND = {"recipe.yaml", "environment.json", "run_id", ".lock", ".responses.jsonl.lock",
               ".answers.jsonl.lock"}  # fmt: skip
"""失败的命令可以留下的：装配时就失败的运行可以直接重来，锁是空的。"""


def files():
    return {
        path: path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and path.parts[0] != "cache" and "__pycache__" not in path.parts
    }


def refused(command, arguments, allowed=frozenset()):
    """跑一条应当被拒绝的命令：返回 ``error:`` 之后的话，并查它没有留下、也没有弄丢什么。"""
    before = files()
    code, out, err = command(*arguments)
    after = files()
    # 日志行以时刻开头，它的续行以空白开头；其余的都是报错。
    found = [text for text in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d |\[\d\d:| ", text)]
    assert (code, out, len(found)) == (2, "", 1), err
    assert found[0].startswith("error: ")
    for path, content in before.items():
        assert after.get(path) == content, path
    assert {path.name for path in after.keys() - before.keys()} <= LEFT_BEHIND | allowed
    return found[0].removeprefix("error: ")


@pytest.mark.parametrize("case", CASES)
def test_bad_data_prints_one_line_writes_nothing_and_loses_nothing(command, data, case):
    arguments, prepare, expected = CASES[case]
    if prepare is not None:
        prepare()
    assert refused(command, arguments) == expected.replace("CWD", str(Path.cwd()))


# ---------------------------------------------------------------------- 服务

ASK = (
    "synthesize.server={{base_url: '{url}', model: m, concurrency: 1, max_retries: 0, timeout: 5}}"
)
SERVER = {
    "401": (
        (401, {"error": {"message": "bad key"}}, {}),
        "URL answered HTTP 401 for model 'm': set server.api_key_env; 0 of 12 answers are in "
        "responses.jsonl: run the same command again to continue",
    ),
    "404": (
        (404, {"error": {"message": "The model `m` does not exist."}}, {}),
        "URL answered HTTP 404 for model 'm': The model `m` does not exist.; check server.model "
        "and server.base_url (up to and including /v1); 0 of 12 answers are in responses.jsonl: "
        "run the same command again to continue",
    ),
    "429": (
        (429, {"message": "slow down"}, {"Retry-After": "0.01"}),
        "URL failed 2 times in a row, the last with: HTTP 429: slow down; 0 of 12 answers are in "
        "responses.jsonl: run the same command again to continue",
    ),
    "500": (
        (500, {"error": {"message": "boom"}}, {}),
        "URL failed 2 times in a row, the last with: HTTP 500: boom; 0 of 12 answers are in "
        "responses.jsonl: run the same command again to continue",
    ),
    "garbage": (
        b"<html>hello</html>",
        "URL failed 2 times in a row, the last with: unexpected reply (body: Invalid JSON: "
        "expected value at line 1 column 1); 0 of 12 answers are in responses.jsonl: run the "
        "same command again to continue",
    ),
    "no choices": (
        {"choices": []},
        "URL failed 2 times in a row, the last with: unexpected reply (choices: List should have "
        "at least 1 item after validation, not 0); 0 of 12 answers are in responses.jsonl: run "
        "the same command again to continue",
    ),
}
ASKED = {"responses.jsonl.provenance.json"}
"""开始提问之前就写好的来历。"""


@pytest.mark.parametrize("case", SERVER)
def test_server_that_never_answers_is_one_line(command, data, stub, case):
    pytest.importorskip("openai")
    reply, expected = SERVER[case]
    stub.script = lambda number, body: reply
    said = refused(command, (*SYNTHESIZE, SET, ASK.format(url=stub.url)), ASKED)
    assert said == expected.replace("URL", stub.url)


def test_key_that_is_not_set_is_one_line(command, data, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    server = "{base_url: 'http://localhost/v1', model: m, api_key_env: TEACHER_KEY}"
    said = refused(command, (*SYNTHESIZE, SET, f"synthesize.server={server}"))
    assert said == (
        "server.api_key_env names TEACHER_KEY, which is not set: export TEACHER_KEY=... first"
    )


def test_server_that_is_down_is_one_line(command, data, stub):
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        said = refused(command, (*SYNTHESIZE, SET, ASK.format(url=url)), ASKED)
    assert said == (
        f"cannot connect to {url}: is it up?; 0 of 12 answers are in responses.jsonl: "
        f"run the same command again to continue"
    )


def test_server_that_dies_midway_keeps_the_answers_and_the_next_run_asks_the_rest(
    command, data, stub
):
    pytest.importorskip("openai")
    ask = (*SYNTHESIZE, SET, ASK.format(url=stub.url))
    stub.script = lambda number, body: completion("red") if number < 5 else (401, {}, {})
    said = refused(command, ask, ASKED | {"responses.jsonl"})
    assert said.endswith(
        "5 of 12 answers are in responses.jsonl: run the same command again to continue"
    )
    answered = Path("responses.jsonl").read_bytes()
    assert len(answered.splitlines()) == 5
    stub.script = lambda number, body: completion("red")
    assert command(*ask)[0] == 0
    assert Path("responses.jsonl").read_bytes().startswith(answered)
    assert len(stub.bodies) == 6 + 7


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("keep", "KeyError: 'shade'"),
        ("number", "TypeError: it returned 0.5, expected True or False"),
    ],
)
def test_filter_that_raises_keeps_the_answers_for_the_next_run(command, data, function, reason):
    Path("my_checks.py").write_text(CHECKS)
    ask = filtered(f"function: 'my_checks:{function}'")
    # 最长的 prompt 先问
    assert refused(command, ask, ASKED | {"responses.jsonl"}) == (
        f"synthesize.filter failed on the answer to 't10': {reason}; 12 of 12 answers are in "
        f"responses.jsonl: run the same command again to continue"
    )
    rows = read_rows("responses.jsonl")
    assert len(rows) == TASKS
    assert command(*filtered("regex: ''"))[0] == 0
    assert [row["response"] for row in read_rows("responses.jsonl")] == [
        row["response"] for row in rows
    ]


# ---------------------------------------------------------------------- 已经有了的东西


@pytest.fixture
def unfinished(command, data):
    """一次没有走完的运行。"""
    assert command(*TRAIN)[0] == 0
    Path("runs/recipe/summary.json").unlink()
    return data


LATER = {
    "resume: a response was edited": (
        (*TRAIN, "--resume"), both(*(turns(name, said("blue")) for name in (PLAIN, KNOWING))),
        "runs/recipe/checkpoints/step-00000002: the training data differs from what this run began "
        "with: restore data.source, or name a new run with --set name=..."),
    "resume: pairs that no longer match": ((*TRAIN, "--resume"), edit(KNOWING, rename),
        "plain.jsonl and knowing.jsonl share no id: found 't0', 't1', 't2', ... in the first and "
        "'u0', 'u1', 'u2', ... in the second"),
    "resume: teacher file gone": ((*TRAIN, "--resume"), remove(KNOWING),
        "'knowing.jsonl' does not exist; did you mean 'plain.jsonl'?"),
    "evaluate: data file gone": (("evaluate", "recipe"), remove(PLAIN),
        "'plain.jsonl' does not exist; did you mean 'knowing.jsonl'?"),
    "export: teacher gone": (
        ("export", "recipe", "--output", "out"), lambda: shutil.rmtree("teacher"),
        "cannot read source 'teacher': no such file or directory; expected a local path, a hub "
        "id NAMESPACE/NAME, pypi:NAME==VERSION/PATH/IN/WHEEL, or shipped:PATH"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_bad_data_after_training_loses_nothing(command, unfinished, case):
    arguments, prepare, expected = LATER[case]
    prepare()
    before = files()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    (found,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert found == f"error: {expected}"
    after = files()
    for path, content in before.items():
        if path.name not in ("recipe.yaml", "environment.json", "run_id", ".lock"):
            assert after[path] == content, path


def test_template_that_drops_the_experience_asks_nothing(command, data):
    template(DROPS_SYSTEM)()
    assert refused(command, SYNTHESIZE, ASKED) == (
        "the chat template drops or changes the system message 'all items here are red'; put it "
        "in the user message; 0 of 12 answers are in responses.jsonl: run the same command again "
        "to continue"
    )


def test_output_of_other_settings_is_not_mixed_into(command, data):
    assert command(*SYNTHESIZE)[0] == 0
    said = refused(command, (*SYNTHESIZE, SET, "synthesize.sampling.max_new_tokens=3"))
    assert said == (
        "responses.jsonl was begun with other settings: sampling.max_new_tokens (was 4, is now "
        "3); restore them, or name another file with synthesize.output"
    )


def test_match_that_raises_leaves_a_run_that_can_be_resumed(command, data):
    """使用者的函数只有见到回答才会出错：那时评测已经写下，改好之后接着来。"""
    Path("my_checks.py").write_text(CHECKS)
    match = "evaluate.tasks.colours.match={exact: false, function: 'my_checks:keep'}"
    said = refused(command, (*TASK, SET, match), {"metrics.jsonl"})
    assert said == (
        "evaluate.tasks.colours.match failed on the response to 't0': KeyError: 'shade'"
    )
    assert command(*TASK, "--resume")[0] == 0
    assert Path("runs/recipe/summary.json").is_file()


# ---------------------------------------------------------------------- 空的 rollout


def silent_student() -> None:
    """``silent/``：读到 assistant 之后的换行，立刻说 ``<|im_end|>``。"""
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=400, max_position_embeddings=128,
        tie_word_embeddings=False, eos_token_id=397,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        state = torch.nn.functional.normalize(model.model.embed_tokens.weight[newline], dim=0)
        model.lm_head.weight[end] = 4 * state
    model.save_pretrained("silent")
    tokenizer.save_pretrained("silent")


def test_student_that_stops_at_once_is_trained_on_and_reported(command, data):
    silent_student()
    code, _, err = command(*ON_POLICY, SET, "student.path=silent", SET, "train.learning_rate=1e-6",
                           SET, "train.min_learning_rate=0")  # fmt: skip
    assert code == 0, err
    assert "step 1: 100% of the sampled responses are empty" in re.sub(r"\s+", " ", err)
    assert err.count("responses are empty") == 1
    rows = [
        row for row in read_metrics(Path("runs/recipe/metrics.jsonl")) if row["kind"] == "train"
    ]
    assert [row["rollout_empty"] for row in rows] == [1.0, 1.0]
    assert all(row["tokens"] == 2 * row["step"] for row in rows)
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
