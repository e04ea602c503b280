"""改变对话的键都读或都拒绝：各家格式里的每一种，写出应当得到的对话。"""

import pytest

from distillab.config.style import Style
from distillab.data.conversations import parse_conversation
from distillab.errors import DistillabError

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
EARLIER = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


def parse(record, **options):
    return parse_conversation(record, "data.jsonl:3", **options)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": SHAREGPT, "system": "Answer briefly."}, [SYSTEM, USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "system": "Answer briefly."}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "2+2?", "completion": "4", "system": "Answer briefly."}, [SYSTEM, USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "system_prompt": "Answer briefly."}, [SYSTEM, USER, ASSISTANT]),
        ({"text": "### Human: 2+2?### Assistant: 4", "system": "Answer briefly."}, [SYSTEM, USER, ASSISTANT]),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "Answer briefly. "}, [SYSTEM, USER, ASSISTANT]),
        ({"conversations": SHAREGPT, "system": "", "tools": "[]"}, [USER, ASSISTANT]),
        ({"instruction": "2+2?", "output": "4", "history": [["1+1?", "2"]]}, [*EARLIER, USER, ASSISTANT]),
        ({"prompt": "2+2?", "completion": "4", "history": [["1+1?", "2"]], "system": "Answer briefly."},
         [SYSTEM, *EARLIER, USER, ASSISTANT]),
        ({"instruction": "2+2?", "input": "", "output": "4", "history": []}, [USER, ASSISTANT]),
        # 许多数据集把问题另写一遍，或连格式带内容写成一段 text
        ({"prompt": "2+2?", "prompt_id": "x", "messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"instruction": "2+2?", "output": "4", "text": "Below is ...\n2+2?\n### Response:\n4"}, [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "images": [], "weight": 1.0}, [USER, ASSISTANT]),
        # 各轮里的
        ({"messages": [{**USER, "images": None, "name": ""}, {**ASSISTANT, "tool_calls": [], "refusal": None}]},
         [USER, ASSISTANT]),
        ({"messages": [USER, {**ASSISTANT, "weight": 1}]}, [USER, ASSISTANT]),
        ({"messages": [{**USER, "train": False}, {**ASSISTANT, "loss": True}]}, [USER, ASSISTANT]),
        ({"messages": [USER, {**ASSISTANT, "reasoning": "Two and two."}]},
         [USER, {**ASSISTANT, "reasoning_content": "Two and two."}]),
        ({"messages": [USER, {**ASSISTANT, "thinking": "Hm.", "reasoning_content": "Hm."}]},
         [USER, {**ASSISTANT, "reasoning_content": "Hm."}]),
        ({"messages": [{**USER, "name": "Ann"}, ASSISTANT]}, [{**USER, "name": "Ann"}, ASSISTANT]),
        ({"messages": [{"role": None, "from": "human", "value": "2+2?"}, ASSISTANT]}, [USER, ASSISTANT]),
    ],
)  # fmt: skip
def test_keys_that_change_the_conversation_are_read(record, expected):
    assert parse(record).messages == expected


@pytest.mark.parametrize("key", ["weight", "train", "loss_mask", "training", "loss"])
def test_turns_of_weight_zero_are_read_but_not_trained_on(key):
    off = {**EARLIER[1], key: 0}
    conversation = parse({"messages": [EARLIER[0], off, USER, {**ASSISTANT, key: 1}]})
    assert [turn.get("train", True) for turn in conversation.messages] == [True, False, True, True]
    assert conversation.prompt == [*EARLIER, USER]
    # 其后的各轮不训练，也没有谁要读
    conversation = parse({"messages": [*EARLIER, USER, {**ASSISTANT, key: False}]})
    assert conversation.messages == EARLIER
    with pytest.raises(DistillabError, match="no assistant turn is to be trained on"):
        parse({"messages": [USER, {**ASSISTANT, key: 0}]})


def test_another_response_keeps_what_is_trained_and_drops_the_old_reasoning():
    record = {"messages": [EARLIER[0], {**EARLIER[1], "train": False}, USER,
                           {**ASSISTANT, "reasoning": "Hm."}]}  # fmt: skip
    other = parse(record).answered("four")
    assert other.messages[1]["train"] is False
    assert other.messages[-1] == {"role": "assistant", "content": "four"}


@pytest.mark.parametrize(
    "tools", [TOOLS, '[{"type": "function", "function": {"name": "add", "parameters": {}}}]']
)
def test_tools_become_an_option_of_the_template(tools):
    conversation = parse({"conversations": SHAREGPT, "tools": tools})
    style = Style(options={"a": 1})
    assert style.with_tools(conversation.tools).options == {"a": 1, "tools": TOOLS}
    assert style.with_tools(parse({"conversations": SHAREGPT}).tools) == style


def test_other_keys_are_metadata_and_named():
    turn = {**ASSISTANT, "language": "English", "toxic": False, "timestamp": None}
    conversation = parse({"id": 1, "source": "x", "score": 0.5, "messages": [USER, turn]})
    assert conversation.unread == {"source", "score", "turn.language"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "Be long."}, "system and the system turn disagree"),
        ({"prompt": "2+2?", "completion": "4", "system": "a", "system_prompt": "b"},
         "system and system_prompt of the record disagree"),
        ({"messages": [USER, ASSISTANT], "system": 3}, "expected text in system, found 3"),
        ({"prompt": "2+2?", "completion": "4", "history": [["1+1?"]]}, "expected [user, assistant] in history[0]"),
        ({"prompt": "2+2?", "completion": "4", "history": "1+1? 2"}, "expected a list of [user, assistant] in hist"),
        ({"prompt": [USER], "completion": "4", "history": [["1+1?", "2"]]}, "history and a prompt of several messages"),
        ({"messages": [USER, ASSISTANT], "history": [["1+1?", "2"]]}, "history is part of the conversation, but is not"),
        ({"messages": [USER, ASSISTANT], "prompt": "3+3?"}, "prompt is part of the conversation, but is not read beside"),
        ({"messages": [USER, ASSISTANT], "input": "more"}, "input is part of the conversation"),
        ({"instruction": "2+2?", "output": "4", "context": "Numbers."}, "context is part of the conversation"),
        ({"prompt": "2+2?", "completion": "4", "rejected": "5"}, "rejected is part of the conversation"),
        ({"messages": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "5"}]}, "rejected is part"),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images is part of the conversation"),
        ({"messages": [USER, ASSISTANT], "audio": {"path": "a.wav"}}, "audio is part of the conversation"),
        ({"messages": [USER, ASSISTANT], "functions": [{}]}, "functions is part of the conversation"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is part"),
        ({"prompt": "2+2?", "completion": "4", "reasoning": "Two and two."}, "reasoning is part of the conversation"),
        ({"prompt": "2+2?", "completion": "4", "text": "A document."}, "text and prompt disagree"),
        ({"messages": [USER, ASSISTANT], "conversations": [{"from": "human", "value": "3+3?"}]}, "conversations is part"),
        ({"messages": [USER, ASSISTANT], "weight": 0.5}, "weight is 0.5, but a record has no weight"),
        ({"messages": [USER, ASSISTANT], "loss_mask": [0, 1]}, "loss_mask is [0, 1], but a record has no weight"),
        ({"messages": [USER, ASSISTANT], "tools": "add(a, b)"}, "expected a list of tools in tools"),
        ({"messages": [USER, ASSISTANT], "tools": ["add"]}, "expected a list of tools in tools"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weight of messages[1] is 0.5, expected 0 or 1"),
        ({"messages": [USER, {**ASSISTANT, "train": "false"}]}, 'train of messages[1] is "false", expected 0 or 1'),
        ({"messages": [USER, {**ASSISTANT, "weight": 0, "train": True}]}, "weight and train of messages[1] disagree"),
        ({"messages": [{**USER, "train": True}, ASSISTANT]}, "messages[0] is to be trained on, but it is the user's"),
        ({"messages": [{**USER, "reasoning": "Hm."}, ASSISTANT]}, "messages[0] has reasoning, but it is the user's"),
        ({"messages": [USER, {**ASSISTANT, "reasoning": "a", "thinking": "b"}]}, "reasoning and thinking of messages[1]"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "2+2?"}, ASSISTANT]}, "role and from of messages[0]"),
        ({"messages": [{**USER, "value": "3+3?"}, ASSISTANT]}, "content and value of messages[0] disagree"),
        ({"messages": [{**USER, "images": ["a.png"]}, ASSISTANT]}, "messages[0] has images, which is not supported"),
        ({"messages": [USER, {**ASSISTANT, "refusal": "No."}]}, "messages[1] has refusal, which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, ASSISTANT]},
         'expected text in messages[0], found {"type": "text", "text": null}'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]}, "expected text in messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}, ASSISTANT]},
         "expected text in messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, ASSISTANT]},
         "expected text in messages[0]"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_read_are_refused_in_one_line(record, message):
    with pytest.raises(DistillabError) as error:
        parse(record)
    assert str(error.value).startswith("data.jsonl:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_where_no_response_is_read_its_keys_do_not_matter():
    record = {"prompt": "2+2?", "response": "4", "rejected": "5", "reasoning": "Two and two."}
    assert parse(record, need_response=False).messages == [USER]
    with pytest.raises(DistillabError, match="context is part of the conversation"):
        parse({"prompt": "2+2?", "context": "Numbers."}, need_response=False)
