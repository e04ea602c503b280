"""两个视角怎样配对，以及训练之前查出来的每一种对不上。"""

import json

import pytest

from distillab.config.sections import DataSection
from distillab.data.chat_dataset import ChatDataset
from distillab.data.pairs import load_pairs, read_experience
from distillab.errors import DistillabError

EXPERIENCE = "Lesson: always carry the one when the digits add up to ten or more."
PLAIN = "You add numbers."
TAUGHT = f"{PLAIN}\n\n{EXPERIENCE}"


def task(name, question, response=None, system=PLAIN, **extra):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return {**({} if name is None else {"id": name}), "messages": messages, **extra}


STUDENT = [task("a", "17+5?"), task("b", "28+4?"), task("c", "39+3?")]
TEACHER = [
    task("c", "39+3?", "42, carried.", TAUGHT),
    task("a", "17+5?", "22, carried.", TAUGHT),
    task("b", "28+4?", "32, carried.", TAUGHT),
]


def without_ids(records):
    return [{"messages": record["messages"]} for record in records]


@pytest.fixture
def write(tmp_path):
    def call(name: str, records) -> str:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return call


@pytest.fixture
def load(write):
    def call(student, teacher=None, responses=None, *, need_response=True, **options):
        options = {"loss_on": "last", **options}
        if teacher is not None:
            options["teacher_source"] = write("exp.jsonl", teacher)
        if responses is not None:
            options["responses"] = write("responses.jsonl", responses)
        data = DataSection(source=write("plain.jsonl", student), format="chat", **options)
        return load_pairs(data, need_response=need_response)

    return call


@pytest.fixture
def error(load):
    def call(*args, **options) -> str:
        with pytest.raises(DistillabError) as caught:
            load(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


# ---------------------------------------------------------------------- 两个文件


def test_tasks_are_matched_by_id_in_the_order_of_the_student(load):
    pairs, notes = load(STUDENT, TEACHER)
    assert [pair.key for pair in pairs] == ["a", "b", "c"]
    for pair in pairs:
        assert pair.student.messages[0]["content"] == PLAIN
        assert pair.teacher.messages[0]["content"] == TAUGHT
        assert pair.student.question == pair.teacher.question
        assert pair.student.response == pair.teacher.response
    assert pairs[0].student.response == "22, carried."
    assert notes == ["paired 3 tasks by their id"]


@pytest.mark.parametrize("both", [True, False])
def test_without_ids_tasks_are_matched_by_their_last_question(load, both):
    pairs, notes = load(without_ids(STUDENT) if both else STUDENT, without_ids(TEACHER))
    assert [pair.student.response for pair in pairs] == [
        "22, carried.",
        "32, carried.",
        "42, carried.",
    ]
    assert notes == ["paired 3 tasks by their last question"]


def test_experience_may_be_in_the_user_message(load):
    teacher = [task("a", f"{EXPERIENCE}\n\n17+5?", "22"), *TEACHER[::2]]
    pairs, _ = load(STUDENT, teacher)
    assert EXPERIENCE in pairs[0].teacher.question
    assert pairs[0].student.question == "17+5?"


def test_a_student_without_a_system_message_is_paired(load):
    student = [task("a", "17+5?", system=None)]
    pairs, _ = load(student, [task("a", "17+5?", "22", EXPERIENCE)])
    assert [message["role"] for message in pairs[0].student.messages] == ["user", "assistant"]


def test_the_response_written_with_experience_wins_and_is_reported(load):
    student = [task("a", "17+5?", "21"), task("b", "28+4?", "32, carried.\n"), STUDENT[2]]
    pairs, notes = load(student, TEACHER)
    assert pairs[0].student.response == pairs[0].teacher.response == "22, carried."
    (note,) = notes[1:]
    assert note.startswith("1 responses differ between the two files; used those of ")
    assert "exp.jsonl" in note


def test_the_students_response_is_used_where_the_teacher_has_none(load):
    pairs, _ = load([task("a", "17+5?", "22")], [task("a", "17+5?", None, TAUGHT)])
    assert pairs[0].teacher.response == "22"


def test_answers_come_from_either_file(load):
    pairs, _ = load(
        [task("a", "17+5?", answer="22"), task("b", "28+4?")],
        [task("a", "17+5?", "x", TAUGHT, answer="?"), task("b", "28+4?", "y", TAUGHT, answer=32)],
    )
    assert [pair.student.answer for pair in pairs] == ["22", "32"]


def test_tasks_in_one_file_alone_are_left_out_and_reported(load):
    pairs, notes = load(
        [*STUDENT, task("d", "1+1?")], [*TEACHER[:2], task("e", "2+2?", "4", TAUGHT)]
    )
    assert [pair.key for pair in pairs] == ["a", "c"]
    assert notes[1].startswith("left out 2 tasks that are only in ")
    assert notes[1].endswith("plain.jsonl: 'b', 'd'")
    assert notes[2].endswith("exp.jsonl: 'e'")


def test_prompts_alone_are_paired_where_no_response_is_needed(load):
    teacher = [
        task(record["id"], record["messages"][1]["content"], None, TAUGHT) for record in TEACHER
    ]
    pairs, _ = load(STUDENT, teacher, need_response=False)
    assert all(pair.student.response is pair.teacher.response is None for pair in pairs)
    assert pairs[0].teacher.prompt == pairs[0].teacher.messages


def test_files_that_share_no_task_are_refused(error):
    message = error([task("x", "1?"), task("y", "2?")], TEACHER)
    assert "share no id: found 'x', 'y' in the first and 'c', 'a', 'b' in the second" in message
    message = error(without_ids([task(None, "1?")]), without_ids(TEACHER))
    assert "share no last question: found '1?' in the first" in message


def test_ids_on_some_rows_alone_are_refused(error):
    message = error([STUDENT[0], task(None, "28+4?")], TEACHER)
    assert "plain.jsonl:2: 1 of 2 conversations have no id; give all of them one" in message


def test_duplicate_ids_are_refused(error):
    message = error([*STUDENT, task("a", "17+5?")], [*TEACHER, TEACHER[0]])
    assert "duplicate id (2: 'a' at " in message
    assert "plain.jsonl:4, 'c' at " in message
    message = error(without_ids([*STUDENT, STUDENT[1]]), without_ids(TEACHER))
    assert "duplicate last question (1: '28+4?' at " in message


def test_different_questions_are_refused(error):
    message = error(STUDENT, [*TEACHER[:2], task("b", "28+5?", "33", TAUGHT)])
    assert "the last user messages differ (1: 'b' at " in message


@pytest.mark.parametrize(
    "student",
    [
        task("a", f"17+5?\n{EXPERIENCE}"),
        task("a", f"{EXPERIENCE}\n17+5?", system=None),
        task("a", f"17+5?\n{EXPERIENCE.replace(' ', chr(10), 3)}", system=None),
    ],
    ids=["plain", "no system", "wrapped"],
)
def test_experience_in_the_students_prompt_is_refused(error, student):
    question = student["messages"][-1]["content"]
    message = error([student], [task("a", question, "22", TAUGHT)])
    assert "the student's prompt holds the experience (1: 'a' at " in message


def test_a_short_addition_that_is_also_in_the_question_is_no_leak(load):
    pairs, _ = load(
        [task("a", "Use 10. 17+5?")], [task("a", "Use 10. 17+5?", "22", f"{PLAIN} Use 10.")]
    )
    assert len(pairs) == 1


def test_a_line_that_the_student_reads_elsewhere_is_no_leak(load):
    question = f"{PLAIN} 17+5?"
    pairs, _ = load([task("a", question, system=None)], [task("a", question, "22", TAUGHT)])
    assert len(pairs) == 1


LONG = "What is the sum of seventeen and five?"


@pytest.mark.parametrize(
    "added",
    [
        [{"role": "assistant", "content": f"search({LONG!r})"}, {"role": "tool", "content": f"{LONG}\n22"}],
        [{"role": "assistant", "content": LONG}, {"role": "tool", "content": f"> {LONG}\n{LONG}\n22"}],
        [{"role": "tool", "content": "Carry the one: 22."}],
    ],
)  # fmt: skip
def test_a_tool_that_quotes_the_user_is_no_leak(load, added):
    """教师在问题之后多读了工具的结果；它前面的各轮与学生的相同。"""
    student = task("a", LONG)
    teacher = {"id": "a", "messages": [*student["messages"], *added, {"role": "assistant", "content": "22"}]}  # fmt: skip
    pairs, _ = load([student], [teacher])
    assert len(pairs) == 1


def test_an_experience_that_quotes_the_whole_question_is_no_leak(load):
    taught = f"{PLAIN}\nA hint for\n{LONG}\ncarry."
    assert load([task("a", LONG)], [task("a", LONG, "22", taught)])


def test_experience_in_the_students_tool_result_is_refused(error):
    def record(result, answer, tool):
        messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "look_up()"},
                    {"role": "tool", "content": result}]  # fmt: skip
        messages[:0] = [{"role": "system", "content": tool}]
        return {"id": "a", "messages": [*messages, *([{"role": "assistant", "content": answer}] if answer else [])]}  # fmt: skip

    message = error([record(EXPERIENCE, None, PLAIN)], [record(EXPERIENCE, "22", TAUGHT)])
    assert "the student's prompt holds the experience (1: 'a' at " in message


def test_tools_must_agree(load, error):
    tools = [{"type": "function", "function": {"name": "add"}}]
    teacher = task("a", "17+5?", "22", TAUGHT, tools=tools)
    assert "the tools of the two files differ (1: 'a'" in error([STUDENT[0]], [teacher])
    (pair,), _ = load([task("a", "17+5?", tools=tools)], [teacher])
    assert pair.task("teacher").tools == pair.task("student").tools == tools


def test_the_reasoning_of_the_response_reaches_both_views(load):
    thought = task("a", "17+5?", None, TAUGHT)
    thought["messages"].append({"role": "assistant", "content": "22", "reasoning": "Carry."})
    (pair,), _ = load([STUDENT[0]], [thought])
    assert pair.student.final == pair.teacher.final
    assert pair.student.final["reasoning_content"] == "Carry."
    rows = [{"id": "a", "response": "22", "reasoning": "Carry."}]
    (pair,), _ = load([STUDENT[0]], responses=rows)
    assert pair.student.final["reasoning_content"] == "Carry."


def test_keys_that_are_not_read_are_named(load):
    _, notes = load([task("a", "17+5?", "22", source="x", level=3)])
    (note,) = notes
    assert note.endswith("plain.jsonl: keys that are not part of the conversation: level, source")


@pytest.mark.parametrize("system", [PLAIN, f" {PLAIN}\n", None])
def test_a_teacher_that_reads_nothing_more_is_refused(error, system):
    message = error([STUDENT[0]], [task("a", "17+5?", "22", system)])
    assert "the teacher's prompt holds nothing that the student's lacks (1: 'a' at " in message


def test_swapped_files_are_refused(error):
    student = [task("a", "17+5?", "22", TAUGHT)]
    assert "holds nothing that the student's lacks" in error(student, [STUDENT[0]])


def test_a_task_without_a_response_in_either_file_is_refused(error):
    message = error(STUDENT, [task("a", "17+5?", "", TAUGHT), *TEACHER[::2]])
    assert "no response in either file (1: 'a' at " in message


def test_earlier_turns_must_agree_only_when_they_are_trained(load, error):
    def turns(first, system, last):
        record = task("a", "17+5?", first, system)
        record["messages"].append({"role": "user", "content": "And 28+4?"})
        if last:
            record["messages"].append({"role": "assistant", "content": last})
        return [record]

    student, teacher = turns("21", PLAIN, None), turns("22", TAUGHT, "32")
    message = error(student, teacher, loss_on="all")
    assert "earlier assistant turns differ (set data.loss_on to last) (1: 'a'" in message
    pairs, _ = load(student, teacher, loss_on="last")
    assert pairs[0].student.messages[2]["content"] == "21"
    assert pairs[0].student.response == "32"
    assert load(turns("22", PLAIN, None), teacher, loss_on="all")


def test_all_problems_are_reported_at_once_with_three_examples_each(error):
    student = [task(str(i), f"{i}+1?") for i in range(9)]
    teacher = [task(str(i), f"{i}+1?", "x", PLAIN) for i in range(5)]
    teacher += [task("5", "another?", "x", TAUGHT), task("6", "6+1?", None, TAUGHT)]
    message = error([*student, student[0]], teacher)
    for part in ("duplicate id (1:", "lacks (5: '0'", "differ (1: '5'", "either file (1: '6'"):
        assert part in message
    assert message.count("exp.jsonl:") == 1 + 3
    assert ", ...)" in message


# ---------------------------------------------------------------------- 一段经验


def test_experience_joins_the_system_message(load):
    pairs, _ = load([task("a", "17+5?", "22")], experience=EXPERIENCE)
    assert pairs[0].student.messages[0]["content"] == PLAIN
    assert pairs[0].teacher.messages[0]["content"] == f"{EXPERIENCE}\n\n{PLAIN}"
    assert pairs[0].teacher.messages[1:] == pairs[0].student.messages[1:]


def test_experience_becomes_the_system_message_where_there_is_none(load):
    pairs, _ = load([task("a", "17+5?", "22", None)], experience=EXPERIENCE)
    assert pairs[0].teacher.messages[0] == {"role": "system", "content": EXPERIENCE}
    assert [message["role"] for message in pairs[0].student.messages] == ["user", "assistant"]


def test_experience_joins_the_last_user_message(load):
    record = task("a", "17+5?", "22")
    record["messages"] += [
        {"role": "user", "content": "28+4?"},
        {"role": "assistant", "content": "32"},
    ]
    template = "{message}\n(Hint: {experience})"
    pairs, _ = load(
        [record], experience=EXPERIENCE, experience_role="user", experience_template=template
    )
    contents = [message["content"] for message in pairs[0].teacher.messages]
    assert contents == [PLAIN, "17+5?", "22", f"28+4?\n(Hint: {EXPERIENCE})", "32"]


def test_braces_in_texts_are_only_text(load):
    pairs, _ = load([task("a", "f{x} {experience}?", "22")], experience="write {message} or {0}",
                    experience_role="user")  # fmt: skip
    assert pairs[0].teacher.question == "write {message} or {0}\n\nf{x} {experience}?"


def test_experience_is_read_from_a_file(tmp_path, monkeypatch):
    (tmp_path / "lessons").write_text(f"\ufeff{EXPERIENCE}\n", encoding="utf-8")
    (tmp_path / "lessons.md").write_text(EXPERIENCE)
    monkeypatch.chdir(tmp_path)
    for text in ("lessons", "lessons.md", "./lessons.md", str(tmp_path / "lessons.md")):
        assert read_experience(text) == EXPERIENCE
    assert read_experience("Lesson.\nRead lessons.md") == "Lesson.\nRead lessons.md"
    assert read_experience("See lessons.md") == "See lessons.md"
    assert read_experience("x" * 5000) == "x" * 5000


def test_experience_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DistillabError, match=r"data.experience: 'no.txt' does not exist; expected"):
        read_experience("no.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DistillabError, match=r"empty\.txt' is empty; expected what the teacher"):
        read_experience(str(empty))
    with pytest.raises(DistillabError, match="' ' is empty"):
        read_experience(" ")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DistillabError, match=r"binary\.txt' is not UTF-8 text"):
        read_experience(str(tmp_path / "binary.txt"))
    with pytest.raises(DistillabError, match="is a directory; expected a text file"):
        read_experience(str(tmp_path))


def test_the_one_text_in_the_students_prompt_is_refused(error):
    records = [task("a", "17+5?", "22"), task("b", "28+4?", "32", f"{EXPERIENCE}\n{PLAIN}")]
    message = error(records, experience=EXPERIENCE)
    assert "the student's prompt holds the experience (1: 'b' at " in message
    assert "plain.jsonl:2" in message


# ---------------------------------------------------------------------- 教师写好的 response


ANSWERED = [task("a", "17+5?", "old"), task("b", "28+4?", "old"), task("c", "39+3?")]


def test_responses_replace_the_last_turn(load):
    rows = [
        {"id": "b", "response": "32"},
        {"id": "a", "response": "22"},
        {"id": "c", "response": "42"},
    ]
    pairs, notes = load(ANSWERED, responses=rows)
    assert [pair.student.response for pair in pairs] == ["22", "32", "42"]
    assert all(pair.teacher is pair.student for pair in pairs)
    assert notes == []


def test_several_responses_to_one_task_are_several_examples(load):
    rows = [{"id": "a", "response": str(n)} for n in range(3)]
    pairs, notes = load(ANSWERED, responses=rows)
    assert [pair.student.response for pair in pairs] == ["0", "1", "2"]
    assert notes[0].endswith("left out 2 tasks that it does not answer: 'b', 'c'")


def test_responses_are_found_by_the_key_of_the_conversation(load):
    records = without_ids(ANSWERED)
    pairs, _ = load(records, need_response=False)
    rows = [{"id": pair.key, "response": "new"} for pair in pairs]
    assert [pair.student.response for pair in load(records, responses=rows)[0]] == ["new"] * 3


def test_responses_reach_both_views(load):
    rows = [{"id": "a", "response": "new"}]
    for options in ({"teacher": TEACHER}, {"experience": EXPERIENCE}):
        (pair,), _ = load(STUDENT, responses=rows, **options)
        assert pair.student.response == pair.teacher.response == "new"
        assert EXPERIENCE in pair.teacher.messages[0]["content"]
        assert EXPERIENCE not in pair.student.messages[0]["content"]


def test_responses_to_tasks_that_cannot_be_told_apart_are_refused(error):
    records = without_ids([ANSWERED[0], ANSWERED[0]])
    keys = [{"id": "q-4c0b", "response": "x"}]
    assert "answers none of the 1 tasks" in error(records, responses=keys)
    message = error([*ANSWERED, ANSWERED[0]], responses=[{"id": "a", "response": "x"}])
    assert "duplicate id or question, so responses cannot be told apart (1: 'a'" in message


@pytest.mark.parametrize("option", ["responses", "teacher_source"])
def test_a_missing_file_is_named(write, tmp_path, option):
    missing = {option: str(tmp_path / "no.jsonl")}
    data = DataSection(source=write("plain.jsonl", ANSWERED), format="chat", **missing)
    with pytest.raises(DistillabError, match=r"no\.jsonl' does not exist"):
        load_pairs(data)


# ---------------------------------------------------------------------- 普通对话


def test_without_experience_both_views_are_one(load):
    pairs, notes = load(ANSWERED[:2])
    assert all(pair.teacher is pair.student for pair in pairs)
    assert notes == []


def test_the_size_cap_takes_the_first_conversations_and_says_so(load):
    size = sum(len(turn["content"]) for turn in ANSWERED[0]["messages"])
    pairs, notes = load(ANSWERED, need_response=False, size_mb=(size + 1) / 1e6)
    assert [pair.key for pair in pairs] == ["a"]
    assert notes[0].startswith("stopped reading after 1 conversations: size_mb=")


def test_final_questions_without_an_answer_are_reported(load):
    texts = ["### Human: 1?### Assistant: 2### Human: 3?", "### Human: 1?### Assistant: 2"]
    _, notes = load([{"text": text} for text in texts])
    assert notes[0].endswith("plain.jsonl: cut 1 final questions that have no answer")


def test_paired_files_become_examples_with_two_views(write, tiny_tokenizer):
    data = DataSection(
        source=write("plain.jsonl", STUDENT),
        teacher_source=write("exp.jsonl", TEACHER),
        format="chat",
    )
    pairs, notes = load_pairs(data)
    assert notes == ["paired 3 tasks by their id"]
    train, validation, _ = ChatDataset.build(pairs, data, tiny_tokenizer, max_seq_len=128)
    for part in (train, validation):
        for i in range(len(part)):
            example = part[i]
            student, teacher = (
                tiny_tokenizer.decode(view.ids) for view in (example.student, example.teacher)
            )
            assert student.count(EXPERIENCE) == 0
            assert teacher.count(EXPERIENCE) == 1
            assert teacher.replace(f"\n\n{EXPERIENCE}", "") == student
            assert tiny_tokenizer.decode(example.student.labels).endswith(", carried.<|im_end|>")
