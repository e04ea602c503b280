"""对话从哪里读、怎样认出写法，以及坏数据的每一种一行错误。"""

import json
from pathlib import Path

import pytest

from distillab.data.conversations import parse_conversation, question_key, read_conversations
from distillab.errors import DistillabError

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Answer briefly."}


def parse(record, **options):
    return parse_conversation(record, "data.jsonl:3", **options)


def write_jsonl(path: Path, records: list) -> str:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            [USER, ASSISTANT],
        ),
        ({"prompt": "2+2?", "completion": "4"}, [USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": "4"}, [SYSTEM, USER, ASSISTANT]),
        ({"instruction": "2+2?", "output": "4"}, [USER, ASSISTANT]),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Answer briefly."},
            [SYSTEM, {"role": "user", "content": "Add.\n\n2 and 2"}, ASSISTANT],
        ),
        ({"instruction": "2+2?", "input": "", "output": "4"}, [USER, ASSISTANT]),
        ({"text": "### Human: 2+2?### Assistant: 4"}, [USER, ASSISTANT]),
        ({"text": "### Human: 2+2?\n### Assistant: 4\n"}, [USER, ASSISTANT]),
        # 别的键是 null 或不相干时不影响
        ({"prompt": None, "messages": [USER, ASSISTANT], "source": "x"}, [USER, ASSISTANT]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
                    ASSISTANT,
                ]
            },
            [USER, ASSISTANT],
        ),
    ],
)
def test_each_form_becomes_the_same_conversation(record, expected):
    conversation = parse(record)
    assert conversation.messages == expected
    assert conversation.record == record
    assert conversation.response == "4"
    assert conversation.prompt == expected[:-1]
    assert conversation.question == expected[-2]["content"]


def test_a_tool_turn_is_kept():
    messages = [USER, {"role": "assistant", "content": "calc(2+2)"}]
    messages += [{"role": "tool", "content": "4"}, ASSISTANT]
    assert parse({"messages": messages}).messages == messages


def test_a_final_question_without_an_answer_is_cut_from_guanaco_alone():
    text = "### Human: 2+2?### Assistant: 4### Human: Why?"
    conversation = parse({"text": text})
    assert conversation.messages == [USER, ASSISTANT]
    assert conversation.unanswered == 1
    asked = parse({"text": text}, need_response=False)
    assert asked.response is None
    assert asked.question == "Why?"
    with pytest.raises(DistillabError, match="the last turn is the user's"):
        parse({"messages": [USER, ASSISTANT, USER]})


def test_ids_and_answers_are_text():
    conversation = parse({"id": 7, "answer": 4, "messages": [USER, ASSISTANT]})
    assert (conversation.id, conversation.key, conversation.answer) == ("7", "7", "4")


def test_without_an_id_the_last_question_is_the_key():
    first = parse({"messages": [SYSTEM, USER, ASSISTANT]})
    other = parse({"prompt": " 2+2?\n", "completion": "four"})
    assert first.key == other.key == question_key("2+2?")
    assert first.key != parse({"prompt": "2+3?", "completion": "5"}).key


def test_another_response_leaves_the_prompt_alone():
    conversation = parse({"messages": [SYSTEM, USER, ASSISTANT]}).answered("four")
    assert conversation.messages == [SYSTEM, USER, {"role": "assistant", "content": "four"}]
    asked = parse({"prompt": "2+2?"}, need_response=False)
    assert asked.response is None
    assert asked.prompt == [USER]
    assert asked.answered("4").messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER]},
        {"prompt": "2+2?"},
        {"prompt": [USER]},
        {"instruction": "2+2?"},
        {"text": "### Human: 2+2?"},
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        {"prompt": "2+2?", "completion": ""},
    ],
)
def test_a_prompt_alone_is_enough_where_no_response_is_needed(record):
    assert parse(record, need_response=False).messages == [USER]
    with pytest.raises(DistillabError):
        parse(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "2+2?", "reply": "4"},
            "found no conversation; its keys are question, reply; expected messages (or "
            "conversations), prompt with completion, instruction with output, or text with",
        ),
        ({"text": "just some text"}, "found no conversation; its keys are text"),
        ({}, "its keys are none"),
        (["2+2?", "4"], "expected an object holding a conversation, found list"),
        ({"messages": []}, "expected a list of turns in messages, found []"),
        ({"messages": "hello"}, 'expected a list of turns in messages, found "hello"'),
        ({"messages": ["hello"]}, 'expected role and content in messages[0], found "hello"'),
        ({"messages": [{"role": "user", "text": "x"}]}, "in messages[0], found role, text"),
        (
            {"messages": [USER, {"role": "asistant", "content": "4"}]},
            "messages[1] has the unknown role 'asistant'; did you mean 'assistant'?",
        ),
        (
            {"conversations": [{"from": "bing", "value": "4"}]},
            "conversations[0] has the unknown role 'bing'; choose from assistant, system",
        ),
        ({"messages": [{"role": "user", "content": 4}]}, "expected text in messages[0], found 4"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            "messages[1] has tool_calls, which is not supported",
        ),
        ({"prompt": "2+2?"}, "prompt comes without completion; its keys are prompt"),
        ({"instruction": "2+2?", "input": ""}, "instruction comes without output"),
        ({"prompt": {"a": 1}, "completion": "4"}, 'expected text in prompt, found {"a": 1}'),
        ({"messages": [SYSTEM, USER]}, "found no assistant turn to train on, only system, user"),
        ({"messages": [SYSTEM, ASSISTANT]}, "found no user turn, only system, assistant"),
        (
            {"messages": [USER, ASSISTANT, {"role": "tool", "content": "x"}]},
            "the last turn is the tool's; expected the assistant's response",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "\n "}]},
            "turn 2 of 2, an assistant's, is empty",
        ),
        ({"prompt": "2+2?", "completion": ""}, "turn 2 of 2, an assistant's, is empty"),
        (
            {"text": "Hello. ### Human: 2+2?### Assistant: 4"},
            "expected '### Human:' at the start of text, found \"Hello. \"",
        ),
        ({"prompt": "\ud800", "completion": "4"}, "prompt is not valid Unicode"),
    ],
)
def test_a_bad_record_is_one_line_that_names_its_place(record, message):
    with pytest.raises(DistillabError) as error:
        parse(record)
    assert str(error.value).startswith("data.jsonl:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


RECORDS = [{"id": f"t{i}", "prompt": f"{i}+1?", "completion": str(i + 1)} for i in range(3)]


def write(form: str, directory: Path) -> str:
    path = directory / f"data.{form}"
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"id": r["id"], "messages": [{"role": "user", "content": r["prompt"]},
                 {"role": "assistant", "content": r["completion"]}]} for r in RECORDS]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text(json.dumps(RECORDS))
    else:
        write_jsonl(path, RECORDS)
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_files_give_their_conversations_in_order(tmp_path, form):
    read = list(read_conversations(write(form, tmp_path)))
    assert [(c.id, c.question, c.response) for c in read] == [
        (f"t{i}", f"{i}+1?", str(i + 1)) for i in range(3)
    ]


def test_a_directory_gives_the_conversations_of_its_files(tmp_path):
    write("jsonl", tmp_path)
    write("json", tmp_path)
    (tmp_path / "notes.txt").write_text("not a conversation")
    assert len(list(read_conversations(str(tmp_path)))) == 6


def test_data_sets_are_read_as_from_the_hub(tmp_path, monkeypatch):
    directory = tmp_path / "team" / "tasks"
    directory.mkdir(parents=True)
    write("jsonl", directory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distillab.data.conversations.fetch", lambda source, sha256: source)
    read = list(read_conversations("team/tasks", split="train"))
    assert [conversation.id for conversation in read] == ["t0", "t1", "t2"]
    assert read[1].where == "team/tasks: row 1"


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"prompt": "x"')
    with pytest.raises(DistillabError, match=r"data\.jsonl:2: not valid JSON: .*column 15"):
        list(read_conversations(str(path)))


def test_a_missing_file_names_the_nearest(tmp_path):
    write("jsonl", tmp_path)
    with pytest.raises(DistillabError, match=r"dat\.jsonl' does not exist; did you mean 'data"):
        list(read_conversations(str(tmp_path / "dat.jsonl")))


def test_running_text_and_splits_of_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DistillabError, match=r"is running text; expected \.jsonl"):
        list(read_conversations(str(tmp_path / "a.txt")))
    with pytest.raises(DistillabError, match="split 'test' does not apply"):
        list(read_conversations(write("jsonl", tmp_path), split="test"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DistillabError, match=r"empty\.jsonl' is empty"):
        list(read_conversations(str(tmp_path / "empty.jsonl")))
