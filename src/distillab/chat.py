"""对话变成 token：用 tokenizer 自己的 chat template，并找出哪些是 response。

两条原则。模板怎样渲染就怎样训练，从不自己拼 ``<|im_start|>``；response 之前的 token 与推理时
``render_prompt`` 给出的逐个相同，学生在训练与采样时读到的才是同一个 prompt。
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from .batch import Tokens
from .errors import DistillabError, nearest, shown
from .forms import KEPT, Message
from .turn_end import TurnEnd, find_turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""文字里的 ``[start, end)``，单位是字符。"""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RESERVED = {"messages", "add_generation_prompt"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""模板给思考过程起的名字。"""
_TURN_ENDS: WeakKeyDictionary[Any, dict[Hashable, TurnEnd | None]] = WeakKeyDictionary()


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_options: Mapping[str, Any],
    loss_on: Literal["all", "last"],
) -> Tokens:
    """渲染一段以 assistant 结尾的对话。

    Response 从 generation prompt 之后开始，到说完的标记（例如 ``<|im_end|>``）为止，其后的换行
    不算。模板在一轮之后不写标记的，由下一轮的角色标记结束，没有就由 eos：最后一轮之后模板什么也
    不写，就在那里补上，学生才学得会停下；见 ``turn_end``。模板有 ``{% generation %}`` 时只取它圈出
    的部分与补上的标记。正文整段分词一次；如果分词器会让某个 token
    跨过 response 的开头（或受它影响），就在那里切开、两边各自分词：推理时 prompt 是单独分词的。

    Args:
        messages: 各轮，最后一轮是 assistant。
        tokenizer: 有 chat template 的快速分词器。
        template_options: 模板的选项，例如 ``{"enable_thinking": False}``。
        loss_on: 训练每个 assistant 轮，还是只训练最后一轮；开场的 assistant 轮不是回答，总不训练。

    Returns:
        整段对话的 token，与 response 的位置。

    Raises:
        DistillabError: 没有模板，模板拒绝或丢掉了某条消息、不认识选项，或训练与推理时的 prompt
            不同。
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DistillabError(
            "the last turn is not the assistant's; expected a response to train on"
        )
    template = _Template(tokenizer, template_options)
    text = template.text(messages)
    _check_nothing_lost(messages, text)
    turn = turn_end(tokenizer, template_options)
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
    tokens = _tokens(text, spans, blocks, tokenizer)
    if not tokens.response:
        raise DistillabError("the chat template's {% generation %} blocks hold no response")
    return tokens


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_options: Mapping[str, Any],
) -> list[int]:
    """推理时的 prompt，到 generation prompt 为止；结尾的 assistant 轮（如果有）不算在内。

    Args:
        messages: 各轮。
        tokenizer: 有 chat template 的分词器。
        template_options: 模板的选项。

    Returns:
        token；与 :func:`render` 在 ``loss_on="last"`` 时 response 之前的部分相同。

    Raises:
        DistillabError: 与 :func:`render` 相同。
    """
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DistillabError("found no turn before the response; expected a prompt")
    text = _Template(tokenizer, template_options).text(messages, prompt=True)
    _check_nothing_lost(messages, text)
    return _encode(text, tokenizer)[0]


def question_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any]
) -> list[int]:
    """一句话当作 user 消息的 prompt；见 :func:`render_prompt`。"""
    message = {"role": "user", "content": text}
    return render_prompt([message], tokenizer, template_options=template_options)


def turn_end(
    tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any]
) -> TurnEnd | None:
    """结束 assistant 一轮的 token。

    Args:
        tokenizer: 分词器。
        template_options: 模板的选项。

    Returns:
        ``None`` 表示没有模板，或它渲染不了一问一答。
    """
    try:
        template = _Template(tokenizer, template_options)
    except DistillabError:
        return None
    options = json.dumps(template.options, sort_keys=True, default=repr)
    # 模板与特殊 token 可以改：改了就要再看一遍。
    key = (template.source, options, len(tokenizer), tokenizer.eos_token)
    found: dict[Hashable, TurnEnd | None] = _TURN_ENDS.setdefault(tokenizer, {})
    if key not in found:
        found[key] = find_turn_end(template.text, tokenizer)
    return found[key]


def generation_prompt_length(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_options: Mapping[str, Any],
) -> int:
    """Generation prompt（例如 ``<|im_start|>assistant`` 与换行）有几个 token。

    Args:
        messages: 各轮；结尾的 assistant 轮（如果有）不算在内。
        tokenizer: 有 chat template 的快速分词器。
        template_options: 见 :func:`render`。

    Returns:
        至少为 1：没有单独一段的模板，也要有一个 token 来预测 response 的开头。
    """
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    template = _Template(tokenizer, template_options)
    start = len(template.text(prompt))
    _, offsets = _encode(template.text(prompt, prompt=True), tokenizer)
    return max(1, sum(left >= start for left, _ in offsets))


class _Template:
    """一个 tokenizer 的 chat template，连同选项。"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options)
        try:
            source: str = tokenizer.get_chat_template(tools=self.options.get("tools"))
        except ValueError:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise DistillabError(
                f"tokenizer {name!r} has no chat template; use the tokenizer of an instruct model"
            ) from None
        self.source = source
        self.has_blocks = _GENERATION.search(source) is not None
        for key in self.options:
            if key == "tools" and not re.search(r"\btools\b", source):
                raise DistillabError(
                    "the conversation has tools, but the chat template reads none; leave tools out "
                    "of the file, or write them into the system message"
                )
            if key in _RESERVED or not re.search(rf"\b{re.escape(key)}\b", source):
                raise DistillabError(
                    f"template_options: the chat template reads no option {key!r}; "
                    f"{self._options_hint(source, key)}"
                )

    @staticmethod
    def _options_hint(source: str, key: str) -> str:
        names = set(re.findall(r"\b(\w+) is (?:not )?defined", source)) - _RESERVED
        return nearest(key, names) if names else "it has none"

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """整段对话；``prompt`` 时再加上 generation prompt。"""
        return str(self._apply(messages, tokenize=False, add_generation_prompt=prompt))

    def blocks(self, messages: Sequence[Message]) -> list[Span] | None:
        """模板自己用 ``{% generation %}`` 圈出的部分；模板没有这种标记则为 ``None``。"""
        if not self.has_blocks:
            return None
        encoded = self._apply(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        wanted = False
        for inside, (start, end) in zip(
            encoded["assistant_masks"], encoded["offset_mapping"], strict=True
        ):
            if inside:
                spans[-1:] = [(spans[-1][0], end)] if wanted else [*spans[-1:], (start, end)]
            wanted = bool(inside)
        text = self.text(messages)
        return [(start, len(text[:end].rstrip())) for start, end in spans]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        turns = [self._turn(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, **options, **self.options)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DistillabError(
                f"the chat template refuses the turns {roles}: {reason}"
            ) from error

    def _turn(self, message: Message) -> Message:
        """模板读的那些键；它不读的思考过程与名字不能悄悄丢掉。"""
        turn: Message = {"role": message["role"], "content": message["content"]}
        for key in message.keys() & set(KEPT):
            names = _REASONING if key == "reasoning_content" else (key,)
            name = next((name for name in names if self._reads(name)), None)
            if name is not None:
                turn[name] = message[key]
            elif turn["role"] != "tool":  # 哪个工具、哪次调用只是标识
                raise DistillabError(
                    f"the {turn['role']} message {shown(turn['content'])} has {key}, which the "
                    f"chat template does not read; write it into content, or leave it out"
                )
        return turn

    def _reads(self, key: str) -> bool:
        return re.search(rf"(\.|['\"]){key}\b", self.source) is not None


# ---------------------------------------------------------------------- response 在哪里


def _last_span(
    messages: Sequence[Message], text: str, template: _Template, turn: TurnEnd | None
) -> Span:
    before = template.text(messages[:-1], prompt=True)
    if not text.startswith(before):
        at = _first_difference(before, text)
        raise DistillabError(
            f"the chat template puts {shown(before[at:])} before a response that is to be "
            f"generated, but {shown(text[at:])} when the response is given; "
            f"template_options {template.options} do not fit this conversation"
        )
    return _span(before, text, turn)


def _earlier_spans(
    messages: Sequence[Message], text: str, template: _Template, turn: TurnEnd | None
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
                f"the chat template renders turn {number + 1} as {shown(known[at:])} when it is "
                f"the last, but as {shown(text[at:])} once others follow; "
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
                f"{shown(needle)}{hint}"
            )
    reasoning = messages[-1].get("reasoning_content", "").strip()
    if reasoning not in text:
        raise DistillabError(
            f"the chat template drops or changes the reasoning {shown(reasoning)} of the response"
        )


def _visible(message: Message) -> str:
    """思考过程由模板决定去留，不算丢失。"""
    content: str = message["content"]
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


# ---------------------------------------------------------------------- 分词


def _tokens(
    text: str, spans: list[Span], blocks: list[Span] | None, tokenizer: PreTrainedTokenizerBase
) -> Tokens:
    ids: list[int] = []
    response: list[int] = []
    done = 0  # 这个字符之前的都已进了 ids
    piece, offsets = _encode(text, tokenizer)
    for start, end in spans:
        prompt, _ = _encode(text[done:start], tokenizer)
        if piece[: len(prompt)] != prompt:
            ids += prompt
            done = start
            piece, offsets = _encode(text[done:], tokenizer)
            prompt = []
        for position in range(len(prompt), len(piece)):
            # 开头在里面就算：没有结束标记的模板里，句号可能与其后的换行合成一个 token。
            left = done + offsets[position][0]
            if left >= end:
                break
            if blocks is None or any(a <= left < b for a, b in blocks):
                response.append(len(ids) + position)
    return Tokens(ids + piece, response)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """``(token, 每个 token 在 text 里的位置)``；模板已经写好了 bos，不再添。"""
    if not tokenizer.is_fast:
        raise DistillabError(
            f"tokenizer {tokenizer.name_or_path!r} does not tell where its tokens are in the text; "
            f"expected one with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]
