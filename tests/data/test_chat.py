"""用真实的 chat template 渲染：response 在哪里，prompt 与推理时是不是同一个。"""

import copy
import unicodedata

import pytest
from families import LLAMA3, QWEN25
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distillab.config.style import Style
from distillab.data.chat import generation_prompt_length, render, render_prompt
from distillab.errors import DistillabError

# 各家模板的要点，删去了工具调用。
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.searching and message.role == 'user' %}"
    "{%- set ns.searching = false %}{%- set ns.last_query_index = index %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n'"
    " + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
# SmolLM3 的写法：{% generation %} 把 header 与结尾的换行也圈了进去。
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_SPECIAL = ["<|im_start|>", "<|im_end|>"]
SPECIAL = {
    QWEN25: [],
    QWEN3: ["<think>", "</think>"],
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    SMOLLM2: [],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    GENERATION: [],
}
END = {LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>"}

SYSTEM = {"role": "system", "content": "Answer in one word."}
TURNS = [
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "中国的首都呢？"},
    {"role": "assistant", "content": "北京。\n\n再见"},
]
NO_THINKING = {"enable_thinking": False}


@pytest.fixture(scope="module")
def using(tiny_tokenizer):
    """换一个 chat template，连同它的特殊 token。"""

    def make(template: str, special: list[str] | None = None) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        names = SPECIAL.get(template, []) if special is None else special
        tokenizer.add_special_tokens({"additional_special_tokens": CHATML_SPECIAL + names})
        if names:
            tokenizer.bos_token = names[0]
        tokenizer.chat_template = template
        return tokenizer

    made: dict[str, PreTrainedTokenizerFast] = {}
    return lambda template: made.setdefault(template, make(template))


def last(messages, tokenizer, **options):
    return render(messages, tokenizer, style=Style(options=options), loss_on="last")


def every(messages, tokenizer, **options):
    return render(messages, tokenizer, style=Style(options=options), loss_on="all")


def prompt_of(messages, tokenizer, **options):
    return render_prompt(messages, tokenizer, style=Style(options=options))


def runs(tokens, tokenizer) -> list[str]:
    """每一段连续的 response 的文字。"""
    texts, previous = [], None
    for position in tokens.response:
        if previous is None or position != previous + 1:
            texts.append([])
        texts[-1].append(tokens.ids[position])
        previous = position
    return [tokenizer.decode(ids) for ids in texts]


ALL = pytest.mark.parametrize(
    "template", [QWEN25, LLAMA3, SMOLLM2, GEMMA, GENERATION],
    ids=["qwen2.5", "llama3", "smollm2", "gemma", "generation"],
)  # fmt: skip


@ALL
def test_all_trains_every_assistant_turn_with_its_end_and_nothing_else(using, template):
    tokenizer = using(template)
    tokens = every(TURNS, tokenizer)
    end = END.get(template, "<|im_end|>")
    assert runs(tokens, tokenizer) == ["Paris." + end, "北京。\n\n再见" + end]
    assert tokenizer.decode(tokens.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)


@ALL
def test_last_trains_the_last_turn_after_the_prompt_of_inference(using, template):
    tokenizer = using(template)
    tokens = last(TURNS, tokenizer)
    assert runs(tokens, tokenizer) == ["北京。\n\n再见" + END.get(template, "<|im_end|>")]
    assert tokens.prompt == prompt_of(TURNS, tokenizer) == prompt_of(TURNS[:-1], tokenizer)
    text = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokens.prompt) == text


@ALL
def test_a_single_turn_is_the_same_under_all_and_last(using, template):
    tokenizer = using(template)
    assert every(TURNS[:2], tokenizer) == last(TURNS[:2], tokenizer)


def test_the_template_writes_bos_and_the_tokenizer_adds_none(using):
    tokenizer = copy.deepcopy(using(LLAMA3))
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    ids = last(TURNS, tokenizer).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_default_system_prompt_belongs_to_the_prompt(using):
    tokenizer = using(QWEN25)
    tokens = last(TURNS[:2], tokenizer)
    assert tokenizer.decode(tokens.prompt).startswith("<|im_start|>system\nYou are Qwen.<|im_end|>")
    own = last([SYSTEM, *TURNS[:2]], tokenizer)
    assert "You are Qwen" not in tokenizer.decode(own.ids)


def test_an_opening_assistant_turn_is_read_but_not_trained(using):
    tokenizer = using(SMOLLM2)
    opening = {"role": "assistant", "content": "How can I help?"}
    assert runs(every([opening, *TURNS[:2]], tokenizer), tokenizer) == ["Paris.<|im_end|>"]


# ---------------------------------------------------------------------- Qwen3


def test_without_thinking_the_empty_block_belongs_to_the_prompt(using):
    tokenizer = using(QWEN3)
    tokens = last(TURNS, tokenizer, **NO_THINKING)
    assert runs(tokens, tokenizer) == ["北京。\n\n再见<|im_end|>"]
    assert tokenizer.decode(tokens.prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokens.prompt == prompt_of(TURNS, tokenizer, **NO_THINKING)


def test_with_thinking_the_reasoning_is_part_of_the_response(using):
    tokenizer = using(QWEN3)
    content = "<think>\nA large city.\n</think>\n\nParis."
    messages = [*TURNS[:1], {"role": "assistant", "content": content}]
    assert runs(last(messages, tokenizer), tokenizer) == [content + "<|im_end|>"]
    assert runs(every(messages, tokenizer), tokenizer) == [content + "<|im_end|>"]


def test_thinking_that_the_template_drops_from_earlier_turns_is_not_a_lost_message(using):
    tokenizer = using(QWEN3)
    thought = {"role": "assistant", "content": "<think>\n首都呢？\n</think>\n\nParis."}
    messages = [TURNS[0], thought, *TURNS[2:]]
    assert last(messages, tokenizer).labels == last(TURNS, tokenizer).labels


@pytest.mark.parametrize("options", [{}, NO_THINKING])
def test_all_is_refused_where_earlier_turns_are_not_what_was_generated(using, options):
    with pytest.raises(DistillabError, match=r"turn 2 as '<think>.*' when it is the last, but as "
                       r"'Paris\..*' once others follow; set data.loss_on to last"):  # fmt: skip
        every(TURNS, using(QWEN3), **options)


def test_thinking_in_the_data_without_thinking_in_the_template_is_refused(using):
    messages = [TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis."}]
    with pytest.raises(DistillabError, match=r"puts .* before a response that is to be generated, "
                       r"but 'Hm.*template_options {'enable_thinking': False} do not fit"):  # fmt: skip
        last(messages, using(QWEN3), **NO_THINKING)


def test_all_is_refused_where_an_earlier_turn_would_be_generated_after_another_prompt(using):
    template = SMOLLM2.replace(
        "assistant\\n' }}{% endif %}",
        "assistant\\n' + ('!' if messages|length == 1 else '') }}{% endif %}",
    )
    assert template != SMOLLM2
    with pytest.raises(
        DistillabError, match="renders turn 2 as '!' when it is the last, but as 'P"
    ):
        every(TURNS, using(template))
    assert last(TURNS, using(template)).response


def test_a_tool_turn_within_the_last_question_is_rendered(using):
    tokenizer = using(QWEN3)
    messages = [
        TURNS[0],
        {"role": "assistant", "content": "look_up(France)"},
        {"role": "tool", "content": 'a "quoted" result'},
        TURNS[1],
    ]
    assert runs(last(messages, tokenizer, **NO_THINKING), tokenizer) == ["Paris.<|im_end|>"]


# ---------------------------------------------------------------------- 轮里的其他键


REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.name or m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_reaches_a_template_that_reads_it_and_is_trained_on(using):
    tokenizer = using(REASONS)
    messages = [TURNS[0], {**TURNS[1], "reasoning_content": "A city."}]
    expected = "<think>\nA city.\n</think>\n\nParis.<|im_end|>"
    assert runs(last(messages, tokenizer), tokenizer) == [expected]
    other = using(REASONS.replace("m.reasoning_content", "m.thinking"))
    assert runs(last(messages, other), other) == [expected]
    with pytest.raises(
        DistillabError, match=r"assistant message 'Paris.' has reasoning_content, wh"
    ):
        last(messages, using(SMOLLM2))
    # 只写在循环变量的名字里不算读
    with pytest.raises(DistillabError, match="has reasoning_content, which the chat template"):
        last(messages, using(QWEN3))
    drops = using(REASONS.replace("{{ m.reasoning_content }}", "..."))
    with pytest.raises(
        DistillabError, match=r"drops or changes the reasoning 'A city.' of the resp"
    ):
        last(messages, drops)


def test_names_reach_a_template_that_reads_them(using):
    messages = [{**TURNS[0], "name": "Ann"}, TURNS[1]]
    tokenizer = using(REASONS)
    assert tokenizer.decode(prompt_of(messages, tokenizer)).startswith("<|im_start|>Ann\n")
    with pytest.raises(
        DistillabError, match=r"the user message 'The capital of .* has name, which"
    ):
        last(messages, using(SMOLLM2))
    tool = {"role": "tool", "content": "x", "name": "look_up", "tool_call_id": "1"}
    assert last([TURNS[0], TURNS[1], tool, TURNS[1]], using(SMOLLM2)).response


def test_tools_reach_a_template_that_reads_them(using):
    tokenizer = using("{% if tools %}{{ tools|tojson }}\n{% endif %}" + SMOLLM2)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    text = tokenizer.decode(prompt_of(TURNS, tokenizer, tools=tools))
    assert text.startswith('[{"type": "function", "function": {"name": "look_up"}}]')
    assert prompt_of(TURNS, tokenizer) == prompt_of(TURNS, using(SMOLLM2))
    with pytest.raises(DistillabError, match="the conversation has tools, but the chat template r"):
        prompt_of(TURNS, using(SMOLLM2), tools=tools)


@pytest.mark.parametrize("template", [SMOLLM2, GENERATION])
def test_turns_that_are_not_to_be_trained_on_are_only_read(using, template):
    tokenizer = using(template)
    messages = [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]
    tokens, everything = every(messages, tokenizer), every(TURNS, tokenizer)
    assert runs(tokens, tokenizer) == ["北京。\n\n再见<|im_end|>"]
    assert tokens.ids == everything.ids


TOOL_AS_JSON = SMOLLM2.replace(
    "+ message['content'] +",
    "+ (message.content|tojson if message.role == 'tool' else message.content) +",
)


@pytest.mark.parametrize("template", [SMOLLM2, TOOL_AS_JSON], ids=["as it is", "escaped"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_tool_that_quotes_the_user_is_no_lost_message(using, template, times):
    question = 'Who said "carpe diem"?\nAnd when?'
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "look_up(carpe diem)"},
        {"role": "tool", "content": f"results for: {question}\nHorace. " * times},
        {"role": "assistant", "content": "Horace."},
    ]
    assert TOOL_AS_JSON != SMOLLM2
    tokenizer = using(template)
    assert runs(last(messages, tokenizer), tokenizer) == ["Horace.<|im_end|>"]
    assert prompt_of(messages, tokenizer) == last(messages, tokenizer).prompt


# ---------------------------------------------------------------------- {% generation %}


def test_generation_blocks_narrow_the_response(using):
    template = GENERATION.replace(
        "{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}",
        "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    )  # fmt: skip
    assert template != GENERATION
    tokenizer = using(template)
    assert runs(every(TURNS, tokenizer), tokenizer) == ["Paris.", "北京。\n\n再见"]


def test_generation_blocks_are_trusted_where_earlier_turns_change(using):
    template = GENERATION.replace(
        "'<|im_start|>assistant\\n' + m.content",
        "'<|im_start|>assistant\\n' + ('!' if loop.last else '') + m.content",
    )
    assert template != GENERATION
    tokenizer = using(template)
    earlier, final = runs(every(TURNS, tokenizer), tokenizer)
    assert earlier == "<|im_start|>assistant\nParis.<|im_end|>"
    assert final == "!北京。\n\n再见<|im_end|>"


def test_generation_blocks_without_a_response_are_refused(using):
    template = GENERATION.replace("m.role == 'assistant'", "m.role == 'user'")
    with pytest.raises(DistillabError, match="blocks hold no response"):
        last(TURNS, using(template))


# ---------------------------------------------------------------------- 分词的边界


def test_a_token_across_the_boundary_is_split_as_at_inference(using):
    template = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A: " \
               "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"  # fmt: skip
    tokenizer = using(template)
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "teacher"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "teacher"},
    ]
    whole = tokenizer(tokenizer.apply_chat_template(messages[:2], tokenize=False))["input_ids"]
    prompt = prompt_of(messages[:2], tokenizer)
    assert whole[: len(prompt)] != prompt, "整段分词时 ' teacher' 应是一个跨过边界的 token"
    tokens = last(messages[:2], tokenizer)
    assert tokens.prompt == prompt
    assert runs(tokens, tokenizer) == ["teacher<|im_end|>"]
    assert runs(every(messages, tokenizer), tokenizer) == ["teacher<|im_end|>"] * 2
    assert last(messages, tokenizer).prompt == prompt_of(messages, tokenizer)


def gpt2_like(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """GPT-2 的切词规则：行尾的 ``\\n\\n`` 单独分词时是一个 token，后面有字时是两个。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Answer:\n\n"] * 20 + ["Paris is the answer"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\nAnswer:\n\n"
        "{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_prompt_that_reads_ahead_is_split_as_at_inference(trim_offsets):
    tokenizer = gpt2_like(trim_offsets)
    messages = [TURNS[0], {"role": "assistant", "content": "Paris is\nthe answer"}]
    prompt = prompt_of(messages, tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert whole[: len(prompt)] != prompt, "没有 token 跨过边界，但 prompt 的分词不同"
    tokens = last(messages, tokenizer)
    assert tokens.prompt == prompt
    assert runs(tokens, tokenizer) == ["Paris is\nthe answer</s>"]


def test_a_response_without_an_end_marker_keeps_its_last_token():
    """Qwen 的切词规则把句号与其后的换行放在一起。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\s\w]+[\r\n]*|\w+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["Paris.\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}" \
                              "{% if add_generation_prompt %}assistant:{% endif %}"  # fmt: skip
    assert ".\n" in {tokenizer.decode([i]) for i in range(300)}
    assert runs(every(TURNS, tokenizer), tokenizer) == ["Paris.\n", "北京。\n\n再见</s>"]


CONTENT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t'A中é:"),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    contents=st.lists(CONTENT, min_size=2, max_size=6),
    template=st.sampled_from([QWEN25, LLAMA3, SMOLLM2, GENERATION]),
)
def test_any_content_trains_as_it_is_generated(using, contents, template):
    tokenizer = using(template)
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    final = last(messages, tokenizer)
    assert final.prompt == prompt_of(messages, tokenizer)
    end = END.get(template, "<|im_end|>")
    written = [c.strip() if template == LLAMA3 else c for c in contents[1::2]]
    expected = [unicodedata.normalize("NFC", c) + end for c in written]
    assert runs(final, tokenizer) == expected[-1:]
    everything = every(messages, tokenizer)
    assert runs(everything, tokenizer) == expected
    assert everything.labels[-len(final.labels) :] == final.labels


# ---------------------------------------------------------------------- 真实的分词器


@pytest.fixture(scope="module", params=["smollm2", "qwen"])
def real(request, package_cache):
    """真实的词表与模板；Qwen 的再配上 Qwen3 的。"""
    from distillab.models.tokenizer import load_tokenizer

    if request.param == "smollm2":
        return load_tokenizer(str(request.getfixturevalue("smollm2_dir")))
    return load_tokenizer(str(request.getfixturevalue("qwen_ranks")))


ODD = [
    "\n\nTwo lines first.",
    "  indented",
    "42",
    "emoji 🙂\n",
    "…",
    "结尾有空格 ",
    "```py\nx = 1\n```",
]


@pytest.mark.parametrize("content", ODD)
def test_real_tokenizers_train_on_what_they_generate(real, content):
    messages = [*TURNS, TURNS[0], {"role": "assistant", "content": content}]
    final, everything = last(messages, real), every(messages, real)
    assert final.prompt == prompt_of(messages, real)
    assert runs(final, real) == [content + "<|im_end|>"]
    assert runs(everything, real) == [
        f"{c}<|im_end|>" for c in ("Paris.", "北京。\n\n再见", content)
    ]
    assert everything.labels[-1] == real.convert_tokens_to_ids("<|im_end|>")


def test_real_tokenizers_read_a_system_message(real):
    text = real.decode(last([SYSTEM, *TURNS], real).prompt)
    assert text.startswith("<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user")


def test_qwen3_with_the_real_vocabulary(real, monkeypatch):
    monkeypatch.setattr(real, "chat_template", QWEN3)
    tokens = last(TURNS, real, **NO_THINKING)
    assert runs(tokens, real) == ["北京。\n\n再见<|im_end|>"]
    assert tokens.prompt == prompt_of(TURNS, real, **NO_THINKING)


def test_the_generation_prompt_is_measured_in_tokens(using):
    def length(template, **options):
        return generation_prompt_length(TURNS, using(template), style=Style(options=options))

    tokenizer = using(QWEN3)
    plain = len(tokenizer("<|im_start|>assistant\n")["input_ids"])
    assert length(QWEN3) == length(QWEN25) == plain
    empty = len(tokenizer("<|im_start|>assistant\n<think>\n\n</think>\n\n")["input_ids"])
    assert length(QWEN3, **NO_THINKING) == empty > plain
    assert length("{% for m in messages %}[{{ m.content }}]{% endfor %}") == 1


# ---------------------------------------------------------------------- 拒绝


def test_a_template_that_refuses_the_system_message_says_so(using):
    with pytest.raises(DistillabError, match="the chat template refuses the turns system, user"):
        last([SYSTEM, *TURNS], using(GEMMA))
    with pytest.raises(DistillabError, match="System role not supported"):
        prompt_of([SYSTEM, *TURNS], using(GEMMA))


DROPS_SYSTEM = SMOLLM2.replace(
    "{{'<|im_start|>' + message['role']",
    "{% if message['role'] != 'system' %}{{'<|im_start|>' + message['role']",
).replace("{% endfor %}", "{% endif %}{% endfor %}")


@pytest.mark.parametrize("content", ["Answer in one word.", "Paris."])
def test_a_template_that_drops_the_system_message_is_refused(using, content):
    """连 system 的话碰巧也在别的消息里时也要发现。"""
    messages = [{"role": "system", "content": content}, *TURNS]
    message = "drops or changes the system message .*; put it in the user message"
    with pytest.raises(DistillabError, match=message):
        last(messages, using(DROPS_SYSTEM))
    with pytest.raises(DistillabError, match=message):
        prompt_of(messages, using(DROPS_SYSTEM))
    assert last(TURNS, using(DROPS_SYSTEM)).response


def test_a_template_that_changes_the_response_is_refused(using):
    template = GEMMA.replace("| trim +", "| upper +")
    with pytest.raises(DistillabError, match="drops or changes the user message 'The capital"):
        last(TURNS, using(template))


def test_a_tokenizer_without_a_template_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DistillabError, match="has no chat template; use the tokenizer of an instr"):
        last(TURNS, tokenizer)


def test_an_option_that_the_template_does_not_read_is_refused(using):
    message = "reads no option 'enable_thinkin'; did you mean 'enable_thinking'"
    with pytest.raises(DistillabError, match=message):
        last(TURNS, using(QWEN3), enable_thinkin=False)
    with pytest.raises(DistillabError, match="reads no option 'enable_thinking'; it has none"):
        prompt_of(TURNS, using(SMOLLM2), enable_thinking=False)
    with pytest.raises(DistillabError, match="no option 'add_generation_prompt'"):
        last(TURNS, using(QWEN3), add_generation_prompt=True)


def test_a_conversation_without_a_response_is_refused(using):
    with pytest.raises(DistillabError, match="expected a response to train on"):
        last(TURNS[:-1], using(QWEN25))
    with pytest.raises(DistillabError, match="expected a prompt"):
        prompt_of(TURNS[1:2], using(QWEN25))


def test_a_template_without_the_response_is_refused(using):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(DistillabError, match="drops or changes the assistant message 'Paris"):
        last(TURNS[:2], using(template))
