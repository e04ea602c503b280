"""``StudentModel`` 与 Hugging Face checkpoint 互换，以及由教师的若干层初始化学生。

``StudentModel`` 总是 transformers 里某一家的结构，所以导出的目录不需要本项目也能加载；哪几家见
``config/layouts.py``，设置的互译见 ``models/hf_layout.py``。
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.model_sections import ModelConfig
from ..errors import DistillabError
from ..files import replacing_directory
from ..generate.stops import generation_ids
from ..models.hf_layout import config_from_hf, hf_config_of
from ..models.hf_names import hf_name
from ..models.interface import PretrainedLM, declared_eos
from ..models.lora import has_lora, merged_copy
from ..models.pretrained import check_config, one_line_errors, quiet_transformers
from ..models.student import StudentModel
from ..vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
# 权重只在其余的字段相同时才有同样的含义。
_CHOSEN = ("num_layers", "max_seq_len", "dropout")
# 没写的与教师不同也是错误；其余没写就是教师的。
_WIDTHS = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size",
           "rope_theta", "norm_eps")  # fmt: skip
_GENERATION = "generation_config.json"

# ---------------------------------------------------------------- 导入


def from_hf(model_or_directory: PreTrainedModel | PretrainedLM | str | Path) -> StudentModel:
    """导入 Qwen2、Qwen3、Llama、Mistral、Gemma 2、Gemma 3（文字）的权重：全部的层，原来的宽度。

    Args:
        model_or_directory: 已加载的 Hugging Face 模型，或含 ``config.json`` 与 safetensors 的目录。

    Returns:
        float32 的 ``StudentModel``，与原模型的 logits 相同。

    Raises:
        DistillabError: 目录不完整，结构不受支持，或权重缺失、形状不符。
    """
    if isinstance(model_or_directory, str | Path):
        hf_config, generation, state = _read_directory(Path(model_or_directory))
    else:
        model = _unwrap(model_or_directory)
        hf_config, generation, state = model.config, model.generation_config, model.state_dict()
    config = _layout(hf_config, state)
    return _load(state, hf_config, generation, config, range(config.num_layers))


def evenly_spaced_layers(total: int, keep: int) -> list[int]:
    """从教师的 ``total`` 层里均匀挑 ``keep`` 层的层号，升序，含首尾两层；只留一层时取第一层。"""
    if not 1 <= keep <= total:
        raise DistillabError(f"init.layers={keep}, expected 1 to {total}, the teacher's layers")
    if keep == 1:
        return [0]
    # 整数四舍五入：Python 的 round 逢 .5 取偶，间隔会忽大忽小。
    gaps = keep - 1
    return [(index * (total - 1) + gaps // 2) // gaps for index in range(keep)]


def student_from_teacher(
    teacher: PreTrainedModel | PretrainedLM,
    layers: int | Sequence[int] | None = None,
    config: ModelConfig | None = None,
) -> StudentModel:
    """由教师的 ``layers``（均匀挑几层，或一列层号）初始化学生，float32；教师同 ``from_hf``。

    Embedding 与最终归一化照抄。``config`` 用来另定 ``max_seq_len`` 与 ``dropout``，宽度必须与教师
    一致；``layers`` 缺省为 ``config.num_layers``，再没有就全部保留。
    """
    model = _unwrap(teacher)
    own = _layout(model.config, model.state_dict())
    if config is not None:
        for field, expected in own:
            found = getattr(config, field)
            if field in _CHOSEN or _same(found, expected):
                continue
            if field in _WIDTHS or found != ModelConfig.model_fields[field].default:
                raise DistillabError(
                    f"student.config.{field}={found} differs from the teacher's, "
                    f"expected {expected}: its layers only fit that value"
                )
        count = len(layers) if isinstance(layers, Sequence) else layers
        if count not in (None, config.num_layers):
            raise DistillabError(
                f"init.layers={count} and student.config.num_layers={config.num_layers} disagree"
            )
        layers = config.num_layers if layers is None else layers
    if isinstance(layers, Sequence):
        picks = list(layers)
    else:
        picks = evenly_spaced_layers(own.num_layers, own.num_layers if layers is None else layers)
    given = {} if config is None else {name: getattr(config, name) for name in _CHOSEN}
    config = own.keeping(picks).model_copy(update={**given, "num_layers": len(picks)})
    return _load(model.state_dict(), model.config, model.generation_config, config, picks)


def _layout(hf_config: Any, state: Mapping[str, Tensor]) -> ModelConfig:
    """对方的结构；与 ``config_from_hf`` 只差在偏置上。"""
    config = config_from_hf(hf_config)
    if config.layout == "llama" and not config.qkv_bias:
        # 由 Llama（与没有窗口的 Mistral）来的学生也有 Qwen2.5 的偏置，从 0 起训练；logits 不变。
        config = config.model_copy(update={"qkv_bias": True})
    names = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config.num_layers)]
    if config.o_bias and not any(bool(state[name].any()) for name in names if name in state):
        # 我们自己导出的：那一家的 o 不能没有偏置。
        config = config.model_copy(update={"o_bias": False})
    return config


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        # 有的转换工具按 float32 存 eps，1e-5 读回来是 9.99999975e-06。
        return math.isclose(found, expected, rel_tol=1e-6)
    return bool(found == expected)


def _unwrap(model: PreTrainedModel | PretrainedLM) -> Any:
    return model.model if isinstance(model, PretrainedLM) else model


def _read_directory(directory: Path) -> tuple[Any, Any, dict[str, Tensor]]:
    from safetensors.torch import load_file
    from transformers import AutoConfig, GenerationConfig

    files = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").is_file() or not files:
        raise DistillabError(
            f"{directory}: expected a directory with config.json and *.safetensors files"
        )
    state: dict[str, Tensor] = {}
    check_config(directory / "config.json")
    with one_line_errors("model", str(directory)):
        for file in files:
            state.update(load_file(file))
        generation = None
        if (directory / _GENERATION).is_file():
            generation = GenerationConfig.from_pretrained(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return config, generation, state


def _load(
    state: Mapping[str, Tensor],
    hf_config: Any,
    generation: Any,
    config: ModelConfig,
    layers: Sequence[int],
) -> StudentModel:
    """新建学生，抄入权重与停止 token；``layers[i]`` 是学生第 i 层的来源。"""
    student = StudentModel(config)
    student.eos_token_ids = declared_eos(generation, hf_config)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            source = hf_name(name, layers, config.post_norms)
            found = state.get(source)
            if found is None:
                if name.endswith(_QKV_BIASES) and not config_from_hf(hf_config).qkv_bias:
                    continue  # 没有偏置等价于偏置为 0，而新建的偏置正是 0。
                raise DistillabError(f"{source} is missing from the checkpoint")
            if found.shape != parameter.shape:
                raise DistillabError(
                    f"{source} has shape {list(found.shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(found)
    return student


# ---------------------------------------------------------------- 导出


def to_hf_state_dict(
    student: StudentModel, vocabulary: Vocabulary | None = None
) -> dict[str, Tensor]:
    """学生的权重，按对方命名，float32，在 CPU 上连续；绑定的 ``lm_head.weight`` 不重复存。

    给出训练时的 ``vocabulary`` 时，没有参与的行换成参与的均值。
    """
    layers, post_norms = range(student.config.num_layers), student.config.post_norms
    state = {
        hf_name(name, layers, post_norms): weight.detach().to("cpu", torch.float32).contiguous()
        for name, weight in student.named_parameters()
    }
    if vocabulary is not None and len(vocabulary) != student.vocab_size:
        if vocabulary.limit > student.vocab_size:
            raise DistillabError(
                f"vocabulary limit is {vocabulary.limit}, expected at most {student.vocab_size}"
            )
        # 填充行从未训练，logit 停在 0 附近，而真实 token 的 logit 可以整体低于 0：别处的采样器
        # 不会裁词表，就会采到没有文字的 id。均值行的 logit 是全体的平均，永远不会最大。
        trained = vocabulary.mask(torch.arange(student.vocab_size))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                weight = state[name].clone()
                weight[~trained] = weight[trained].mean(0)
                state[name] = weight
    return state


def export_student(
    model: StudentModel | PretrainedLM,
    tokenizer: Any,
    directory: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    card: str | None = None,
) -> Path:
    """写出 ``AutoModelForCausalLM`` 与 ``AutoTokenizer`` 能直接加载的目录。

    先写到同级的临时目录再改名，所以目标目录要么不存在，要么是完整的。

    Args:
        model: 学生；``PretrainedLM`` 用它自己的 ``save_pretrained``，LoRA 先并进一份 float32 拷贝。
        tokenizer: Hugging Face tokenizer，连同 chat template 一起写出。
        directory: 目标目录，必须不存在或为空。
        vocabulary: 见 ``to_hf_state_dict``，只用于 ``StudentModel``。
        card: 写进 ``README.md`` 的模型卡。

    Returns:
        目标目录。

    Raises:
        DistillabError: 目标已有内容，或 ``vocabulary`` 越界。
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DistillabError(f"{target}: already exists, expected a new or empty directory")
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with replacing_directory(target, size) as partial:
        if isinstance(model, PretrainedLM):
            whole = merged_copy(model) if has_lora(model) else model.model
            _write_pretrained(whole, generation_ids(tokenizer, model), partial)
        else:
            _write_model(model, tokenizer, partial, vocabulary)
        _write_tokenizer(tokenizer, partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return target


def _write_model(
    student: StudentModel, tokenizer: Any, directory: Path, vocabulary: Vocabulary | None
) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config, state = student.config, to_hf_state_dict(student, vocabulary)
    layout = _exported_layout(config, tokenizer)
    if config.qkv_bias and not config.o_bias and layout != "qwen2":
        # 别家的四个偏置要么都有、要么都没有：多一个 o 的，取 0。
        for index in range(config.num_layers):
            name = f"model.layers.{index}.self_attn.o_proj.bias"
            state[name] = torch.zeros(config.hidden_size)
    special = generation_ids(tokenizer, student)
    hf_config = hf_config_of(
        config,
        layout,
        **special
        | {
            "eos_token_id": tokenizer.eos_token_id,  # 不少读者这里只认一个整数
            "dtype": "float32",
        },
    )
    hf_config.save_pretrained(directory)
    # transformers 5 之前的读者（包括不少推理引擎）只认顶层的 rope_theta，缺了就默默用 10000。
    _update_json(directory / "config.json", rope_theta=config.rope_theta)
    GenerationConfig(**special).save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _exported_layout(config: ModelConfig, tokenizer: Any) -> str:
    """写成哪一家：``config.layout``，除非 AutoTokenizer 会把 tokenizer 换掉。

    它对 qwen2 目录一律用 Qwen 的切词规则，别家的 tokenizer 会被悄悄改写；带偏置的 Llama 与之等价。
    """
    layout = config.layout
    if layout != "qwen2" or _splits_like_qwen2(tokenizer):
        return layout
    if config.sliding_window is None:
        return "llama"
    raise DistillabError(
        f"sliding_window={config.sliding_window} with qkv_bias needs a directory of model_type "
        "qwen2, where AutoTokenizer applies Qwen2's own splitting rules: this tokenizer has others"
    )


def _write_pretrained(model: Any, ids: dict[str, Any], directory: Path) -> None:
    """照它自己的样子写出，只在 generation_config 里补上停止 token。"""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    known = {} if own is None else json.loads(own.to_json_string())
    for key in ("bos_token_id", "pad_token_id"):
        value = known.get(key)
        if isinstance(value, int) and value >= 0:  # 有的配置用 -1 表示没有
            ids = {**ids, key: value}
    # 读进来时容忍的 generation_config（贪心却写着 temperature），transformers 保存时却报错：
    # 训练完了不能因此没有模型，所以交给它一份干净的，再把原来的写回去。
    model.generation_config = GenerationConfig(**ids)
    try:
        with quiet_transformers():
            model.save_pretrained(directory)
    finally:
        model.generation_config = own
    (directory / _GENERATION).write_text(json.dumps(known | ids, indent=2) + "\n", encoding="utf-8")


def _splits_like_qwen2(tokenizer: Any) -> bool:
    """规范化与切词的规则是否与 ``Qwen2Tokenizer`` 写死的相同。"""
    from transformers import Qwen2Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    own, qwen2 = (
        json.loads(tokenizers.to_str())
        for tokenizers in (backend, Qwen2Tokenizer().backend_tokenizer)
    )
    for spec in (own, qwen2):
        for step in (spec["pre_tokenizer"] or {}).get("pretokenizers", ()):
            step.pop("trim_offsets", None)  # 只影响 offsets，不影响切出的 token
    if tokenizer.num_special_tokens_to_add():
        return False  # 自动加上的 bos 之类，Qwen2Tokenizer 不会加
    return all(own[rule] == qwen2[rule] for rule in ("normalizer", "pre_tokenizer"))


def _write_tokenizer(tokenizer: Any, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    config = directory / "tokenizer_config.json"
    if config.is_file() and tokenizer.__class__.__name__ == "TokenizersBackend":
        # transformers 5 给这个类改了名，旧名两代都认得。
        _update_json(config, tokenizer_class="PreTrainedTokenizerFast")


def _update_json(path: Path, **values: Any) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
