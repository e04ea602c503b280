"""密钥只能留在环境变量里：配方拒绝它，报错不重复它，较早写下的文件里的不再往外传。"""

import pytest
import yaml
from pydantic import ValidationError

from distillab.config.recipes import dump_recipe, load_recipe, recipe_schema, shipped_recipes
from distillab.config.schema import Recipe
from distillab.config.sections import ServerConfig
from distillab.credentials import (
    bare_url,
    is_secret_name,
    is_secret_value,
    secrets_in,
    without_secrets,
)
from distillab.errors import DistillabError

HEX = "0123456789abcdef0123456789abcdef"
KEY = f"sk-{HEX}"
HOST = "https://host.example/v1"


def server(**keys):
    return {"base_url": HOST, "model": "m"} | keys


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in (
            "api_key", "apiKey", "api-key", "X-API-Key", "apikey", "access_key", "private_key",
            "Authorization", "Proxy-Authorization", "token", "access_token", "hf_token", "authToken",
            "X-Auth-Token", "password", "db_password", "passwd", "client_secret", "secret", "bearer",
            "Cookie", "aws_credentials",
        )),
        *((name, False) for name in (
            "api_key_env", "max_tokens", "max_new_tokens", "stop_token", "eos_token", "pad_token_id",
            "token_ids", "skip_special_tokens", "tokenizer", "key", "cache_key", "author", "keys",
            "stop_token_ids", "passage", "secretary", "tokens",
        )),
    ],
)  # fmt: skip
def test_names_of_secrets(name, secret):
    assert is_secret_name(name) is secret


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (KEY, True),
        (f" {KEY}\n", True),
        ("sk-proj-Ab12Ab12Ab12Ab12Ab12_Zz", True),
        ("Bearer 0123456789abcdef", True),
        ("hf_AbCdEfGhIjKlMnOpQrStUv", True),
        ("https://me:key@host/v1", True),
        ("https://host/v1", False),
        ("sk-small-korean-language-model", False),
        ("Basic electromagnetism", False),
        ("Write to me@host about https://host", False),
        ("Qwen/Qwen2.5-0.5B", False),
    ],
)
def test_values_that_are_secrets(text, secret):
    assert is_secret_value(text) is secret


def test_no_key_of_a_recipe_looks_like_a_secret():
    names = {name for part in recipe_schema()["$defs"].values() for name in part["properties"]}
    assert "api_key_env" in names
    assert [name for name in names if is_secret_name(name)] == []
    for name in shipped_recipes():
        assert list(secrets_in(load_recipe(name).model_dump(by_alias=True))) == []


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"api_key": "hunter2-x"}, "api_key"),
        ({"api_key_env": KEY}, "api_key_env"),
        ({"api_key_env": "hunter2-x"}, "api_key_env"),
        ({"api_key_env": "my_key"}, "api_key_env"),
        ({"api_key_env": ["hunter2-x"]}, "api_key_env"),
        ({"base_url": "https://me:hunter2-x@host/v1"}, "base_url"),
        ({"base_url": "https://hunter2-x@host/v1"}, "base_url"),
        ({"base_url": "https://host/v1?api_key=hunter2-x"}, "base_url"),
        ({"base_url": "https://host/v1#hunter2-x"}, "base_url"),
        ({"base_url": "https://host/v1;key=hunter2-x"}, "base_url"),
        ({"base_url": f"https://host/{KEY}/v1"}, "base_url"),
        ({"base_url": "hunter2-x"}, "base_url"),
        ({"base_url": ["hunter2-x"]}, "base_url"),
        ({"base_url": "https://[hunter2-x/v1"}, "base_url"),
        ({"model": KEY}, "model"),
        ({"extra_body": {"api_key": "hunter2-x"}}, "extra_body.api_key"),
        ({"extra_body": {"a": {"Headers": {"Authorization": "hunter2-x"}}}}, "Authorization"),
        ({"extra_body": {"headers": [["X", "Bearer hunter2-xhunter2"]]}}, "headers[0][1]"),
        ({"extra_body": {"user": KEY}}, "extra_body.user"),
        ({"extra_body": {KEY: 1}}, "extra_body"),
        ({"extra_body": {"password": 123454321}}, "extra_body.password"),
        ({"extra_body": "hunter2-x"}, "extra_body"),
        ({"concurrency": "hunter2-x"}, "concurrency"),
    ],
)
def test_a_key_is_refused_and_not_repeated(tmp_path, given, key):
    """文件里、``--set`` 里与 Python 里写的都一样。"""
    values = {
        "teacher": {"path": "a/b"}, "data": {"source": "x.jsonl", "format": "chat"},
        "synthesize": {"server": server(**given)},
    }  # fmt: skip
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    said = []
    for overrides in ((), ("synthesize.server=" + yaml.safe_dump(
        server(**given), default_flow_style=True, width=10**6).strip(),)):  # fmt: skip
        with pytest.raises(DistillabError) as caught:
            load_recipe(str(file), overrides)
        said.append(str(caught.value))
    assert said[0].startswith(f"{file}: synthesize.server.")
    assert said[1].startswith("--set: synthesize.server.")
    for text in said:
        assert key in text
        assert "\n" not in text
        assert not any(part in text for part in ("hunter2", HEX, "123454321"))
    with pytest.raises(ValidationError, match=r"holds|expected|valid|permitted") as caught:
        ServerConfig(**server(**given))
    assert not any(part in str(caught.value) for part in ("hunter2", HEX, "123454321"))


def test_the_way_out_is_named(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"data: {{source: x}}\nsynthesize: {{server: {server(token='abc')}}}\n")
    with pytest.raises(DistillabError, match=r"server\.token holds a key.* name that in api_key_e"):
        load_recipe(str(file))
    for override in (
        "synthesize.server.api_key:hunter2",
        "synthesize.server.extra_body={a: hunter2",
    ):
        with pytest.raises(DistillabError, match=r"--set synthesize\.server") as caught:
            load_recipe("quickstart", [override])
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["data.source", "teacher.path", "synthesize.output"])
def test_an_address_with_a_password_is_refused_anywhere(key):
    with pytest.raises(DistillabError, match=f"--set: {key} holds a key") as caught:
        load_recipe("quickstart", [f"{key}=https://me:hunter2@host/data.jsonl"])
    assert "hunter2" not in str(caught.value)


def test_what_is_no_key_passes():
    given = server(
        api_key_env="MY_KEY_2",
        extra_body={"chat_template_kwargs": {"eos_token": "</s>"}, "stop_token_ids": [1],
                    "include_stop_str_in_output": True, "token": None},
    )  # fmt: skip
    assert ServerConfig(**given).extra_body == given["extra_body"]
    for url in ("http://localhost:8000/v1", "https://host/a/v1/", "http://[::1]:80/v1"):
        assert ServerConfig(base_url=url, model="m").base_url == url
    task = {"source": "x.jsonl", "match": {"exact": True}}
    values = {"name": "n", "data": {"source": "a"}, "loss": {"alpha": 0},
              "student": {"tokenizer": "t"}, "evaluate": {"tasks": {"password": task}}}  # fmt: skip
    assert Recipe.model_validate(values).evaluate.tasks.keys() == {"password"}


def test_the_public_recipe_names_no_server():
    recipe = load_recipe(
        "experience/demo-seqkd", [f"synthesize.server={{base_url: {HOST}, model: m}}"]
    )
    assert HOST in dump_recipe(recipe)
    public = dump_recipe(recipe, public=True)
    assert HOST not in public
    assert "server" not in yaml.safe_load(public)["synthesize"]
    assert Recipe.model_validate(yaml.safe_load(public)).synthesize.server is None


def test_old_files_are_cleaned():
    old = {
        "server": server(base_url=f"https://u:p@host/v1?k={KEY}", extra_body={"headers": {
            "Authorization": "abc", "a": [KEY]}}, api_key_env=KEY),
        "tasks": {"password": {"max_tokens": 3}},
    }  # fmt: skip
    assert without_secrets(old) == {
        "server": server(base_url="https://host/v1", extra_body={"headers": {
            "Authorization": "***", "a": ["***"]}}, api_key_env="***"),
        "tasks": {"password": {"max_tokens": 3}},
    }  # fmt: skip
    assert bare_url("nothing") == bare_url("http://[x") == "***"
