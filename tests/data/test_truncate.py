"""截断：留下什么，去掉什么，两个视角的 response 始终相同。"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillab.batch import Example
from distillab.data.chat import render, render_prompt
from distillab.data.truncate import fit
from distillab.errors import DistillabError

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
HEADER = "<|im_start|>assistant\n"


@pytest.fixture
def fitted(tiny_tokenizer):
    def call(*views, length, loss_on="last"):
        return fit(views, tiny_tokenizer, length, loss_on=loss_on)

    return call


@pytest.fixture
def size(tiny_tokenizer):
    """渲染之后的 token 数，不含结尾的换行。"""

    def call(messages):
        tokens = render(messages, tiny_tokenizer, loss_on="last")
        return tokens.response[-1] + 1

    return call


def response(tokens, tokenizer) -> str:
    return tokenizer.decode(tokens.labels)


def test_what_fits_is_left_alone_but_for_the_final_newline(fitted, size, tiny_tokenizer):
    result = fitted([SYSTEM, *TURNS], length=size([SYSTEM, *TURNS]))
    assert (result.prompt_cut, result.response_cut) == (False, False)
    whole = tiny_tokenizer.apply_chat_template([SYSTEM, *TURNS], tokenize=False)
    assert tiny_tokenizer.decode(result.views[0].ids) == whole.rstrip()
    assert result.views[0].response[-1] == len(result.views[0].ids) - 1


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_the_oldest_turns_go_first_and_whole(fitted, size, tiny_tokenizer, loss_on):
    result = fitted([SYSTEM, *TURNS], length=size([SYSTEM, *TURNS]) - 1, loss_on=loss_on)
    (tokens,) = result.views
    short = tiny_tokenizer.apply_chat_template([SYSTEM, *TURNS[2:]], tokenize=False)
    assert tiny_tokenizer.decode(tokens.ids) == short.rstrip()
    assert response(tokens, tiny_tokenizer) == "second answer<|im_end|>"
    assert (result.prompt_cut, result.response_cut) == (True, False)


def test_no_more_turns_go_than_must(fitted, size):
    longer = [SYSTEM, *TURNS, *TURNS, *TURNS]
    for kept in (1, 2, 3, 4, 5):
        shorter = [SYSTEM, *longer[-2 * kept :]]
        (tokens,) = fitted(longer, length=size(shorter)).views
        assert len(tokens.ids) == size(shorter)


def test_then_the_beginning_of_the_prompt_goes(fitted, size, tiny_tokenizer):
    messages = [SYSTEM, *TURNS[2:]]
    result = fitted([SYSTEM, *TURNS], length=size(messages) - 4)
    (tokens,) = result.views
    assert len(tokens.ids) == size(messages) - 4
    assert response(tokens, tiny_tokenizer) == "second answer<|im_end|>"
    assert tiny_tokenizer.decode(tokens.ids).endswith(f"{HEADER}second answer<|im_end|>")
    assert (result.prompt_cut, result.response_cut) == (True, False)


def test_last_of_all_goes_the_end_of_the_response(fitted, tiny_tokenizer):
    header = tiny_tokenizer(HEADER)["input_ids"]
    result = fitted([SYSTEM, *TURNS], length=len(header) + 2)
    (tokens,) = result.views
    assert tokens.ids[: len(header)] == header
    full = tiny_tokenizer("second answer<|im_end|>")["input_ids"]
    assert tokens.labels == full[:2]
    assert tokens.response == [len(header), len(header) + 1]
    assert (result.prompt_cut, result.response_cut) == (True, True)
    assert fitted([SYSTEM, *TURNS], length=len(header)) is None
    assert len(fitted([SYSTEM, *TURNS], length=len(header) + 1).views[0].response) == 1


def test_the_teacher_keeps_its_experience_and_both_lose_the_same_response(
    fitted, size, tiny_tokenizer
):
    experience = {"role": "system", "content": "Experience: " + "look twice. " * 4}
    student, teacher = TURNS[2:], [experience, *TURNS[2:]]
    result = fitted(student, teacher, length=size(teacher) - 3)
    ours, theirs = result.views
    assert "Experience: look twice." in tiny_tokenizer.decode(theirs.ids)
    assert len(theirs.ids) == size(teacher) - 3
    assert ours.labels == theirs.labels
    full = tiny_tokenizer("second answer<|im_end|>")["input_ids"]
    assert ours.labels == full[:-3]
    assert (result.prompt_cut, result.response_cut) == (False, True)
    assert tiny_tokenizer.decode(ours.ids).startswith("<|im_start|>user\nsecond question")
    prompt = render_prompt(teacher, tiny_tokenizer)
    assert fitted(student, teacher, length=len(prompt)) is None


def test_both_views_drop_the_same_turns(fitted, size, tiny_tokenizer):
    experience = {"role": "system", "content": "Look twice."}
    teacher = [experience, *TURNS]
    result = fitted(TURNS, teacher, length=size(teacher) - 1, loss_on="all")
    assert [response(view, tiny_tokenizer) for view in result.views] == [
        "second answer<|im_end|>"
    ] * 2


def test_a_prompt_alone_leaves_room_for_a_response(fitted, tiny_tokenizer):
    messages = TURNS[:3]
    prompt = render_prompt(messages, tiny_tokenizer)
    result = fitted(messages, length=len(prompt) + 1)
    assert result.views[0].ids == prompt
    assert result.views[0].response == []
    assert not result.prompt_cut
    shorter = render_prompt(messages[2:], tiny_tokenizer)
    assert fitted(messages, length=len(prompt)).views[0].ids == shorter
    cut = fitted(messages, length=len(shorter))
    assert cut.views[0].ids == shorter[1:]
    assert cut.prompt_cut
    assert fitted(messages, length=1) is None


def test_views_with_different_responses_are_refused(fitted):
    other = [*TURNS[:3], {"role": "assistant", "content": "another"}]
    with pytest.raises(DistillabError, match="renders the response differently in the two views"):
        fitted(TURNS, other, length=999)


WORDS = st.lists(
    st.sampled_from(["student", "teacher", "温度", "a\nb", "42"]), min_size=1, max_size=6
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    contents=st.lists(WORDS.map(" ".join), min_size=2, max_size=8),
    experience=WORDS.map(" ".join),
    in_system=st.booleans(),
    length=st.integers(1, 120),
    loss_on=st.sampled_from(["all", "last"]),
)
def test_any_two_views_fit_and_share_one_response(
    tiny_tokenizer, contents, experience, in_system, length, loss_on
):
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    student = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    if in_system:
        teacher = [{"role": "system", "content": experience}, *student]
    else:
        joined = {"role": "user", "content": f"{experience}\n\n{student[-2]['content']}"}
        teacher = [*student[:-2], joined, student[-1]]
    result = fit([student, teacher], tiny_tokenizer, length, loss_on=loss_on)
    shortest = [*(turn for turn in teacher if turn["role"] == "system"), *teacher[-2:]]
    prompt = render_prompt(shortest, tiny_tokenizer)
    assert (result is None) == (length <= len(prompt))
    if result is None:
        return
    example = Example(*result.views)  # 两边的 response 不同就会报错
    whole = render(student, tiny_tokenizer, loss_on="last").labels
    final = example.student.labels
    assert max(len(view.ids) for view in result.views) <= length
    assert final
    if loss_on == "last":
        assert final == whole[: len(final)]
        assert result.response_cut == (final != whole)
    assert tiny_tokenizer.decode(example.teacher.ids).count(experience) >= 1
