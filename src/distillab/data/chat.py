"""对话变成 token：用 tokenizer 自己的 chat template，并找出哪些是 response。

两条原则。模板怎样渲染就怎样训练，从不自己拼 ``<|im_start|>``；response 之前的 token 与推理时
``render_prompt`` 给出的逐个相同，学生在训练与采样时读到的才是同一个 prompt。
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..batch import Tokens
from ..config.style import USUAL, Style
from ..errors import DistillabError
from .control_tokens import shown_text
from .forms import Message
from .rendering import Span
from .template import LossOn, Template
from .turn_end import TurnEnd, turn_end


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    style: Style = USUAL,
    *,
    loss_on: LossOn,
) -> Tokens:
    """渲染一段以 assistant 结尾的对话。

    Response 从 generation prompt 之后开始，到说完的标记（例如 ``<|im_end|>``）为止；模板在最后一轮
    之后不写标记的，在那里补上，学生才学得会停下，见 ``turn_end``。模板有 ``{% generation %}`` 时只
    取它圈出的部分与补上的标记。正文整段分词一次；如果分词器会让某个 token 跨过 response 的开头（或
    受它影响），就在那里切开、两边各自分词：推理时 prompt 是单独分词的。

    ``loss_on`` 为 ``all`` 时训练每个 assistant 轮，开场的除外：它不是回答。没有模板，模板拒绝或丢掉
    了某条消息、不认识选项、用了太多时间或内存，训练与推理时的 prompt 不同，或 ``style`` 不许内容里
    有控制 token，都报错。
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DistillabError(
            "the last turn is not the assistant's; expected a response to train on"
        )
    template = Template(tokenizer, style)
    messages = template.read(messages, loss_on)
    text = template.text(messages)
    _check_nothing_lost(messages, text)
    turn = turn_end(tokenizer, style)
    spans = [_last_span(messages, text, template, turn)]
    blocks = template.blocks(messages)
    if loss_on == "all":
        try:
            earlier = _earlier_spans(messages, text, template, turn)
        except DistillabError:
            if blocks is None or not all(turn.get("train", True) for turn in messages):
                raise
            earlier = [block for block in blocks if block[1] <= spans[0][0]]
        spans = [*earlier, *spans]
    start, end = spans[-1]
    if turn is not None and turn.unwritten and not turn.ends(text, end):
        text = text[:end] + turn.unwritten
        spans[-1] = start, len(text)
        blocks = None if blocks is None else [*blocks, (end, len(text))]
    tokens = _tokens(text, spans, blocks, template)
    if not tokens.response:
        raise DistillabError("the chat template's {% generation %} blocks hold no response")
    return tokens


def render_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, style: Style = USUAL
) -> list[int]:
    """推理时的 prompt，到 generation prompt 为止，结尾的 assistant 轮不算；与 :func:`render` 在
    ``loss_on="last"`` 时 response 之前的 token 相同，错误也相同。
    """
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DistillabError("found no turn before the response; expected a prompt")
    template = Template(tokenizer, style)
    messages = template.read(messages)
    text = template.text(messages, prompt=True)
    _check_nothing_lost(messages, text)
    return template.encode(text)[0]


def question_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, style: Style = USUAL
) -> list[int]:
    """一句话当作 user 消息的 prompt；见 :func:`render_prompt`。"""
    return render_prompt([{"role": "user", "content": text}], tokenizer, style)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase, style: Style = USUAL) -> list[int]:
    """接在 prompt 之后的一段文字（选择题的一个选项）的 token。"""
    template = Template(tokenizer, style)
    (message,) = template.read([{"role": "assistant", "content": text}])
    return template.encode(message["content"])[0]


def control_token(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, style: Style = USUAL
) -> str | None:
    """内容里的第一个控制 token；没有则为 ``None``。"""
    template = Template(tokenizer, style)
    return template.controls.first(template.said(messages))


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """模板会不会写当天的日期。"""
    return "strftime_now" in Template(tokenizer).source


def generation_prompt_length(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, style: Style = USUAL
) -> int:
    """Generation prompt 有几个 token，至少为 1：模板没有这一段，也要有一个 token 来预测 response 的
    开头。
    """
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    template = Template(tokenizer, style)
    prompt = template.read(prompt)
    start = len(template.text(prompt))
    _, offsets = template.encode(template.text(prompt, prompt=True))
    return max(1, sum(left >= start for left, _ in offsets))


# ---------------------------------------------------------------------- response 在哪里


def _last_span(
    messages: Sequence[Message], text: str, template: Template, turn: TurnEnd | None
) -> Span:
    before = template.text(messages[:-1], prompt=True)
    if not text.startswith(before):
        at = _first_difference(before, text)
        raise DistillabError(
            f"the chat template puts {shown_text(before[at:])} before a response that is to be "
            f"generated, but {shown_text(text[at:])} when the response is given; "
            f"template_options {template.options} do not fit this conversation"
        )
    return _span(before, text, turn)


def _earlier_spans(
    messages: Sequence[Message], text: str, template: Template, turn: TurnEnd | None
) -> list[Span]:
    """最后一轮之前的 assistant 轮；每一轮都要渲染得与它还是最后一轮时一样。"""
    spans = []
    for number, message in enumerate(messages[:-1]):
        if message["role"] != "assistant" or number == 0 or not message.get("train", True):
            continue
        before = template.text(messages[:number], prompt=True)
        through = template.text(messages[: number + 1])
        if through.startswith(before):
            through = through[: _span(before, through, turn)[1]]
        if not (text.startswith(through) and through.startswith(before)):
            # Qwen3 会去掉以前各轮的 <think>：那样的历史里没有模型当时说的话，不能当作 response。
            known = before if not through.startswith(before) else through
            at = _first_difference(known, text)
            raise DistillabError(
                f"the chat template renders turn {number + 1} as {shown_text(known[at:])} when it "
                f"is the last, but as {shown_text(text[at:])} once others follow; "
                f"set data.loss_on to last"
            )
        end = len(through)
        if turn is not None and not turn.ends(text, end):
            end = turn.next_marker(text, end)
        spans.append((len(before), end))
    return spans


def _span(before: str, through: str, turn: TurnEnd | None) -> Span:
    end = len(through.rstrip()) if turn is None else turn.end_of(through, len(before))
    if end <= len(before):
        raise DistillabError("the chat template renders an empty response")
    return len(before), end


def _first_difference(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _check_nothing_lost(messages: Sequence[Message], text: str) -> None:
    """模板悄悄丢掉的消息（不支持 system 的模板常常如此）比报错更糟：训练的是另一段对话。

    按出现的次数数，因为别的消息里可能碰巧有同样的话。Tool 的内容常被转义，转义后的引文不再是原话，
    所以不查、也不数：没有转义时只会多出现几次。
    """
    contents = [_visible(turn) for turn in messages if turn["role"] != "tool"]
    for message in messages:
        needle = _visible(message).strip()
        if message["role"] == "tool" or not needle:
            continue
        if text.count(needle) < sum(other.count(needle) for other in contents):
            hint = "; put it in the user message" if message["role"] == "system" else ""
            raise DistillabError(
                f"the chat template drops or changes the {message['role']} message "
                f"{shown_text(needle)}{hint}"
            )
    reasoning = messages[-1].get("reasoning_content", "").strip()
    if reasoning not in text:
        raise DistillabError(
            f"the chat template drops or changes the reasoning {shown_text(reasoning)} of the "
            f"response"
        )


def _visible(message: Message) -> str:
    """思考过程由模板决定去留，不算丢失。"""
    content: str = message["content"]
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


# ---------------------------------------------------------------------- 分词


def _tokens(text: str, spans: list[Span], blocks: list[Span] | None, template: Template) -> Tokens:
    ids: list[int] = []
    response: list[int] = []
    done = 0  # 这个字符之前的都已进了 ids
    piece, offsets = template.encode(text)
    for start, end in spans:
        prompt, _ = template.encode(text[done:start])
        if piece[: len(prompt)] != prompt:
            ids += prompt
            done = start
            piece, offsets = template.encode(text[done:])
            prompt = []
        for position in range(len(prompt), len(piece)):
            # 开头在里面就算：没有结束标记的模板里，句号可能与其后的换行合成一个 token。
            left = done + offsets[position][0]
            if left >= end:
                break
            right = done + offsets[position][1]
            if blocks is None or any(left < end and right > start for start, end in blocks):
                response.append(len(ids) + position)
    return Tokens(ids + piece, response)
