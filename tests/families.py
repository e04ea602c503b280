"""各家模型的小样：随机的小权重，tokenizer、chat template 与 generation_config 都是那一家的写法。

``build(name, directory)`` 写下一个 ``from_pretrained`` 能读的目录；几十毫秒一个，可以按模块共享。
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "Knowledge distillation trains a small student to imitate a large teacher.",
    "The capital of France is Paris, and the capital of China is Beijing.",
    "A teacher gives a distribution over tokens, not only the right answer.",
    "知识蒸馏让小模型学习大模型的输出分布。",
    "中国的首都是北京，法国的首都是巴黎。",
    "温度越高，分布越平滑，学生看到的信息越多。",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system_message = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set system_message = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in loop_messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '[INST] ' + (system_message if loop.first else '') + message['content'] + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM4 = (  # 一轮之后没有结束标记：下一轮的角色标记就是
    "[gMASK]<sop>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def byte_level(split: str, special: list[str], bos: str | None = None) -> Tokenizer:
    """Qwen 与 Llama 3 的写法：字节级 BPE，特殊 token 在词表末尾；``bos`` 由后处理器加上。"""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return _finished(backend, special, bos)


def sentencepiece(special: list[str], bos: str, prefix_space: bool) -> Tokenizer:
    """Gemma 与 Mistral 的写法：空格写成 ▁，生僻字退到字节，特殊 token 在最前。"""
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if prefix_space:
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 180, special_tokens=names, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return _finished(_without_special_bytes(backend, special), special, bos)


def _without_special_bytes(backend: Tokenizer, special: list[str]) -> Tokenizer:
    """训练时字节 token 要占位，用起来却是普通 token：只留下真正的特殊 token。"""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(spec))


def _finished(backend: Tokenizer, special: list[str], bos: str | None) -> Tokenizer:
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return backend


@dataclass(frozen=True)
class Family:
    """一家的写法。

    Attributes:
        model_type: transformers 的名字。
        backend: 建 tokenizer 的函数。
        template: chat template。
        eos: tokenizer 的 eos。
        stops: generation_config 里的 eos，按名字。
        bos: tokenizer 的 bos；``adds_bos`` 说它自己会不会加。
        pad: pad token；``None`` 表示没有。
        shape: 除公共的以外的配置。
    """

    model_type: str
    backend: Callable[[], Tokenizer]
    template: str
    eos: str
    stops: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    pad: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)


_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eom_id|>", "<|eot_id|>"]  # fmt: skip
_GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
_MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
_PHI3 = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>",
         "<|system|>"]  # fmt: skip
_GLM4 = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
         "<|observation|>"]  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen2.5": Family(
        "qwen2",
        lambda: byte_level(QWEN_SPLIT, _CHATML),
        QWEN25,
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        shape={"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "qwen3",
        lambda: byte_level(QWEN_SPLIT, _CHATML),
        QWEN3,
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        shape={"tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama3": Family(
        "llama",
        lambda: byte_level(LLAMA3_SPLIT, _LLAMA3, "<|begin_of_text|>"),
        LLAMA3,
        eos="<|end_of_text|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        adds_bos=True,
        shape={"tie_word_embeddings": False},
    ),
    "gemma3": Family(
        "gemma3_text",
        lambda: sentencepiece(_GEMMA, "<bos>", prefix_space=False),
        GEMMA3,
        eos="<eos>",
        stops=("<eos>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        pad="<pad>",
        shape={
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": Family(
        "mistral",
        lambda: sentencepiece(_MISTRAL, "<s>", prefix_space=True),
        MISTRAL,
        eos="</s>",
        stops=("</s>",),
        bos="<s>",
        adds_bos=True,
        shape={"sliding_window": 12, "tie_word_embeddings": False},
    ),
    "lfm2": Family(  # 卷积与注意力各半
        "lfm2",
        lambda: byte_level(
            LLAMA3_SPLIT, ["<|pad|>", "<|startoftext|>", *_CHATML], "<|startoftext|>"
        ),
        "{{- bos_token -}}" + CHATML,
        eos="<|im_end|>",
        stops=("<|im_end|>",),
        bos="<|startoftext|>",
        adds_bos=True,
        pad="<|pad|>",
        shape={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}
"""六家，含一个混合结构。"""

MORE: dict[str, Family] = {
    "phi3": Family(
        "phi3",
        lambda: sentencepiece(_PHI3, "<s>", prefix_space=True),
        PHI3,
        eos="<|endoftext|>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        pad="<|endoftext|>",
    ),
    "glm4": Family(
        "glm4",
        lambda: byte_level(LLAMA3_SPLIT, _GLM4),
        GLM4,
        eos="<|endoftext|>",
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        pad="<|endoftext|>",
        shape={"head_dim": 8},
    ),
    "qwen3_next": Family(  # 线性注意力与注意力各半，MoE
        "qwen3_next",
        lambda: byte_level(QWEN_SPLIT, _CHATML),
        CHATML,
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        shape={
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}
"""停法或结构特别的几家。"""


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """那一家的 tokenizer。"""
    family = (FAMILIES | MORE)[name]
    backend = family.backend()
    tokens = {"eos_token": family.eos, "bos_token": family.bos, "pad_token": family.pad}
    if backend.token_to_id("<unk>") is not None:
        tokens["unk_token"] = "<unk>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{key: token for key, token in tokens.items() if token is not None},
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def build(name: str, directory: Path, seed: int = 0, **shape: Any) -> Path:
    """把那一家的小模型写进 ``directory``，连同 tokenizer 与 generation_config。

    Args:
        name: ``FAMILIES`` 或 ``MORE`` 里的名字。
        directory: 写在哪里，不必存在。
        seed: 权重的种子。
        shape: 改掉的配置，例如 ``num_hidden_layers=1``。
    """
    family = (FAMILIES | MORE)[name]
    tokenizer = tokenizer_of(name)
    ids = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": None if family.bos is None else ids(family.bos),
        "eos_token_id": ids(family.eos),
        "pad_token_id": None if family.pad is None else ids(family.pad),
    }
    size = len(tokenizer) + -len(tokenizer) % 8  # 末尾有几行填充，和真的一样
    values = {**_SHAPE, "vocab_size": size, **special, **family.shape, **shape}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.add_(0.2 * noise)  # Gemma 的归一化以 0 为恒等，别家以 1
            else:
                parameter.copy_(0.2 * noise)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight[len(tokenizer) :] = 0  # 否则贪心会选中没有文字的 id
    model.generation_config = GenerationConfig(
        **{**special, "eos_token_id": [ids(stop) for stop in family.stops]}
    )
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
