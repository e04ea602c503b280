"""服务当教师：一个什么都做得出来的假服务，和一个真的（``transformers serve``）。"""

import dataclasses
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from kept_rows import kept_rows
from stub_server import completion

from distillab.config.sections import FilterConfig, SamplingConfig, ServerConfig, SynthesizeConfig
from distillab.data.pairs import Task
from distillab.errors import DistillabError
from distillab.synthesize.questions import TOO_LONG
from distillab.synthesize.server_backend import ServerBackend
from distillab.synthesize.synthesize import synthesize

pytest.importorskip("openai")


TASKS = [Task(f"t{n}", [{"role": "user", "content": f"q{n}"}], "4", {}) for n in range(6)]


@pytest.fixture
def ask(stub, tmp_path):
    def ask(tasks=TASKS, samples=1, sampling=None, filter=None, **server):
        sampling = sampling or SamplingConfig(temperature=0 if samples == 1 else 1)
        server = {"base_url": stub.url, "model": "m", "concurrency": 2, "max_retries": 1} | server
        backend = ServerBackend(ServerConfig(**server), sampling)
        config = SynthesizeConfig(samples=samples, sampling=sampling, filter=filter)
        return synthesize(tasks, backend, config, tmp_path / "r.jsonl", provenance={}, seed=3)

    ask.output = tmp_path / "r.jsonl"
    return ask


def rows(output):
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def test_answers_come_with_their_origin_and_the_request_says_what_was_asked(stub, ask):
    report = ask(samples=2, sampling=SamplingConfig(temperature=0.5, top_k=7, max_new_tokens=9))
    assert (report.kept, report.tokens, report.exit_code) == (12, 24, 0)
    for row in rows(ask.output):
        assert (row["model"], row["finish_reason"], row["tokens"]) == ("served", "stop", 2)
    seeds = {row["seed"] for row in rows(ask.output)}
    assert len(seeds) == 12
    assert {body.pop("seed") for body in stub.bodies} == seeds
    assert stub.bodies[0].pop("messages")[0]["role"] == "user"
    assert stub.bodies[0] == {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_k": 7}
    origin = json.loads(ask.output.with_name("r.jsonl.provenance.json").read_text())
    assert origin["backend"] == {
        "kind": "server", "model": "m", "base_url": stub.url, "extra_body": {},
    }  # fmt: skip


def test_extra_fields_reach_the_server_and_the_provenance(stub, tmp_path):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    sampling = SamplingConfig(temperature=0, top_k=3)
    for given in ({}, extra):
        config = ServerConfig(base_url=stub.url, model="m", extra_body=given)
        backend = ServerBackend(config, sampling)
        assert backend.describe()["extra_body"] == given
    config = SynthesizeConfig(sampling=sampling)
    synthesize(TASKS[:1], backend, config, tmp_path / "r.jsonl", provenance={}, seed=0)
    assert stub.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert stub.bodies[0]["top_k"] == 3


def test_greedy_sends_no_seed_and_another_address_may_continue(stub, ask):
    ask(tasks=TASKS)
    assert all("seed" not in body and body["temperature"] == 0 for body in stub.bodies)
    assert {row["seed"] for row in rows(ask.output)} == {None}
    assert ask(base_url=stub.url.replace("127.0.0.1", "localhost")).kept == 6
    assert len(stub.bodies) == 6


def test_as_many_requests_as_allowed_are_in_flight_and_no_more(stub, ask):
    def slow(number, body):
        time.sleep(0.05)
        return completion()

    stub.script = slow
    assert ask(samples=3, concurrency=3).kept == 18
    assert stub.most_in_flight == 3


def test_key_comes_from_the_environment_and_is_written_nowhere(stub, ask, monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret\n")
    echo = "your key sk-secret has no quota"
    stub.script = lambda n, body: (
        (400, {"error": {"message": echo}}, {}) if n == 1 else completion()
    )
    with caplog.at_level("DEBUG", logger="distillab"):
        report = ask(api_key_env="TEACHER_KEY", concurrency=1)
    assert set(stub.keys) == {"Bearer sk-secret"}
    assert dict(report.failures) == {"HTTP 400: your key *** has no quota": 1}
    everything = [p.read_text() for p in ask.output.parent.iterdir()] + [str(report), caplog.text]
    assert not any("sk-secret" in text for text in everything)


def test_without_a_named_key_none_is_sent_not_even_the_one_of_openai(stub, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    ask()
    assert set(stub.keys) == {None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "server.api_key_env names TEACHER_KEY, which is not set: export TEACHER_KEY="),
        (" \n", "server.api_key_env names TEACHER_KEY, which is not set"),
        ("sk-密钥", "TEACHER_KEY holds characters that no key has"),
    ],
)
def test_missing_or_broken_key_is_refused_before_the_first_question(
    stub, ask, monkeypatch, value, message
):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(DistillabError, match=re.escape(message)) as caught:
        ask(api_key_env="TEACHER_KEY")
    assert "密钥" not in str(caught.value)
    assert stub.bodies == []


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    config = ServerConfig(base_url="http://localhost/v1", model="m")
    with pytest.raises(DistillabError, match=r"needs the openai package: pip install 'distillab\["):
        ServerBackend(config, SamplingConfig())


def test_retry_after_is_honoured(stub, ask):
    stub.script = lambda n, body: (429, {}, {"Retry-After": "0.9"}) if n == 0 else completion()
    report = ask(tasks=TASKS[:1])
    assert report.kept == 1
    assert len(stub.bodies) == 2
    assert stub.times[1] - stub.times[0] >= 0.9  # 客户端自己的退避至多 0.5 秒


def message(finish_reason="stop", **fields):
    return {"choices": [{"message": fields, "finish_reason": finish_reason}]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_beside_the_response(stub, ask, name):
    stub.script = lambda n, body: message(content="4", **{name: "Two and two."})
    assert ask(tasks=TASKS[:1]).kept == 1
    (row,) = rows(ask.output)
    assert (row["response"], row["reasoning"]) == ("4", "Two and two.")


def test_text_parts_are_the_response_and_a_thought_cut_short_is_not_asked_again(stub, ask):
    parts = [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]
    replies = [message(content=parts), message("length", content=None, reasoning="Two and")]
    stub.script = lambda n, body: replies[n]
    report = ask(tasks=TASKS[:2], concurrency=1)
    assert (report.kept, report.rejected, report.truncated, report.failed) == (1, 1, 1, 0)
    assert [row["response"] for row in rows(ask.output)] == ["four", ""]


def test_tools_are_sent_to_the_server(stub, ask):
    tools = [{"type": "function", "function": {"name": "add"}}]
    ask(tasks=[dataclasses.replace(TASKS[0], tools=tools), TASKS[1]], concurrency=1)
    assert [body.get("tools") for body in stub.bodies] == [tools, None]


GARBAGE = {
    "not json": (b"<html>hello</html>", "unexpected reply (body: Invalid JSON"),
    "html": ((200, b"<html>", {"Content-Type": "text/html"}), "unexpected reply (body: Invalid JSON"),
    "no choices": ({"id": "x"}, "unexpected reply (choices: Field required)"),
    "empty choices": ({"choices": []}, "unexpected reply (choices: List should have"),
    "odd choices": ({"choices": "abc"}, "unexpected reply (choices: Input should be"),
    "no content": (completion(None), "unexpected reply (choices.0.message.content: "),
    "empty content": (completion(""), "unexpected reply (choices.0.message.content: "),
    "tool calls": (message(content="4", tool_calls=[{"id": "1"}]),
                   "unexpected reply (choices.0.message: it holds tool_calls)"),
    "refusal": (message(content=None, refusal="No."),
                "unexpected reply (choices.0.message: it holds refusal)"),
    "image": (message(content=[{"type": "image_url", "image_url": "x"}]),
              "unexpected reply (choices.0.message.content"),
    "only reasoning": (message(content=None, reasoning_content="Hm."),
                       "unexpected reply (choices.0.message.content: no text)"),
    "500": ((500, {"error": {"message": "boom"}}, {}), "HTTP 500: boom"),
    "503 html": ((503, b"<h1>busy</h1>", {"Content-Type": "text/html"}), "HTTP 503: <h1>busy</h1>"),
    "429": ((429, {"message": "slow down"}, {"Retry-After": "0.01"}), "HTTP 429: slow down"),
    "400": ((400, {"detail": "bad role"}, {}), "HTTP 400: bad role"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_question_that_fails_is_left_for_the_next_run(stub, ask, kind):
    reply, reason = GARBAGE[kind]
    stub.script = lambda n, body: reply if body["messages"][0]["content"] == "q2" else completion()
    report = ask()
    assert (report.kept, report.failed, report.exit_code) == (5, 1, 1)
    assert next(iter(report.failures)).startswith(reason)
    assert "run the same command again" in str(report)
    retried = kind in ("500", "503 html", "429")
    assert stub.asked() == Counter({f"q{n}": 1 + (n == 2 and retried) for n in range(6)})
    stub.script = lambda n, body: completion()
    stub.bodies.clear()
    assert ask().exit_code == 0
    assert stub.asked() == {"q2": 1}
    assert Counter(row["id"] for row in rows(ask.output)) == Counter(t.id for t in TASKS)


def test_a_redirect_to_another_host_is_not_followed(stub, ask, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    elsewhere = stub.url.replace("127.0.0.1", "localhost")
    stub.script = lambda n, body: (307, b"", {"Location": f"{elsewhere}/chat/completions"})
    with pytest.raises(DistillabError, match=r"redirects to http://localhost:\d+, which is not fo"):
        ask(api_key_env="TEACHER_KEY", concurrency=1, max_retries=3)
    assert len(stub.bodies) == 1


def test_a_redirect_on_the_same_host_is_followed_as_before(stub, ask):
    stub.script = lambda n, body: (
        (307, b"", {"Location": "/v1/moved"}) if n % 2 == 0 else completion()
    )
    assert ask(concurrency=1).kept == 6
    assert len(stub.bodies) == 12


def packed(text):
    return gzip.compress(json.dumps(completion(text)).encode(), 9, mtime=0)


@pytest.mark.parametrize(
    ("content", "encoding", "reason"),
    [
        (packed(" " * (80 << 20)), "gzip", "a reply above 64 MiB"),
        (
            gzip.compress(packed("4"), mtime=0),
            "gzip, gzip",
            "a reply compressed with 'gzip, gzip', expect",
        ),
        (packed("4"), "br", "a reply compressed with 'br', expected gzip"),
        (b" " * (65 << 20), "identity", "a reply above 64 MiB"),
        (packed("4")[:30], "gzip", "unexpected reply (body: Invalid JSON"),
        (b"\x1f\x8bnot gzip at all", "gzip", "cannot connect"),
    ],
)
def test_a_reply_may_be_compressed_but_not_without_bounds(stub, ask, content, encoding, reason):
    """峰值内存另有界限：解压的每一步至多约 64 MB。"""
    stub.script = lambda n, body: (
        (200, packed("4"), {"Content-Encoding": "gzip"}) if n == 0
        else (200, content, {"Content-Encoding": encoding}) if n == 1 else completion()
    )  # fmt: skip
    report = ask(concurrency=1, max_retries=0)
    assert (report.kept, report.failed) == (5, 1)
    assert next(iter(report.failures)).startswith(reason)


def test_a_server_that_drips_bytes_meets_the_deadline(ask):
    """每个字节都来得及，整个回复却没有完的时候。"""

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(600):
                    self.wfile.write(b" ")
                    time.sleep(0.05)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        report = ask(tasks=TASKS[:1], base_url=url, timeout=0.3)
        server.shutdown()
    assert dict(report.failures) == {"no reply within 0.3 s": 1}
    assert time.monotonic() - started < 6


def test_hanging_request_times_out_while_the_others_go_on(stub, ask):
    def hang(number, body):
        if body["messages"][0]["content"] == "q1":
            stub.released.wait(30)
        return completion()

    stub.script = hang
    report = ask(timeout=2.0, max_retries=0)
    assert dict(report.failures) == {"no reply within 2 s": 1}
    assert report.kept == 5


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((401, {"error": {"message": "bad key"}}, {}),
         "answered HTTP 401 for model 'm': the key in TEACHER_KEY was refused"),
        ((404, {"error": {"message": "The model `m` does not exist."}}, {}),
         "answered HTTP 404 for model 'm': The model `m` does not exist.; check server.model and "
         "server.base_url (up to and including /v1)"),
        ((404, b"<html>nothing here</html>", {}),
         "answered HTTP 404 for model 'm': <html>nothing here</html>; check"),
        ((400, {"error": {"message": "Model Not Exist"}}, {}),
         "answered HTTP 400 for model 'm': Model Not Exist; check"),
        ((402, {"error": {"message": "Insufficient Balance"}}, {}),
         "answered HTTP 402 for model 'm': Insufficient Balance; check"),
    ],
)  # fmt: skip
def test_wrong_key_model_or_address_stops_at_once(stub, ask, monkeypatch, reply, line):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    stub.script = lambda number, body: reply if number == 3 else completion()
    with pytest.raises(DistillabError) as caught:
        ask(api_key_env="TEACHER_KEY", concurrency=1)
    assert str(caught.value).startswith(f"{stub.url} {line}")
    assert str(caught.value).endswith(
        f"; 3 of 6 answers are in {ask.output}: run the same command again to continue"
    )
    assert len(stub.bodies) == 4
    assert len(rows(ask.output)) == 3


@pytest.mark.parametrize("concurrency", [1, 3])
def test_failures_in_a_row_stop_the_run(stub, ask, concurrency):
    stub.script = lambda n, body: (500, {"error": "down"}, {})
    line = (
        f"failed {2 * concurrency} times in a row, the last with: HTTP 500: down; 0 of 60 answers"
    )
    with pytest.raises(DistillabError, match=line):
        ask(samples=10, max_retries=0, concurrency=concurrency)
    assert 2 * concurrency <= len(stub.bodies) < 3 * concurrency


def test_answers_between_failures_keep_the_run_going(stub, ask):
    stub.script = lambda n, body: (500, {}, {}) if n % 2 else completion()
    report = ask(samples=10, max_retries=0, concurrency=1)
    assert (report.kept, report.failed) == (30, 30)


def test_server_that_is_not_there_is_told_from_the_first_question(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(DistillabError, match=rf"^cannot connect to {url}: is it up\?; 0 of 6"):
            ask(base_url=url)


def test_server_without_seeds_is_asked_again_without(stub, ask):
    def strict(number, body):
        refused = (422, {"detail": "Unexpected fields in the request: {'seed'}"}, {})
        return refused if "seed" in body else completion()

    stub.script = strict
    assert ask(sampling=SamplingConfig(), concurrency=1).kept == 6
    assert len(stub.bodies) == 7
    assert {row["seed"] for row in rows(ask.output)} == {None}


def test_prompt_beyond_the_context_is_recorded_and_not_asked_again(stub, ask):
    text = "This model's maximum context length is 2048 tokens. However, you requested 9000"
    stub.script = lambda n, body: (400, {"message": text}, {}) if n == 0 else completion()
    report = ask(concurrency=1)
    assert (report.kept, report.too_long, report.exit_code) == (5, 1, 0)
    row = next(row for row in rows(ask.output) if row["finish_reason"] == TOO_LONG)
    assert row["error"] == text
    assert row["kept"] is False
    ask()
    assert len(stub.bodies) == 6


def test_answers_that_arrive_while_a_filter_fails_are_kept(stub, ask, monkeypatch):
    def keep(record, response):
        while len(stub.bodies) < 6 or stub.in_flight:
            time.sleep(0.01)
        time.sleep(0.5)  # 最后一个回答在路上
        raise ValueError("no")

    check = types.ModuleType("patient_check")
    check.keep = keep
    monkeypatch.setitem(sys.modules, "patient_check", check)
    with pytest.raises(
        DistillabError, match=r"failed on the answer to 't.': ValueError: no; 6 of 6"
    ):
        ask(filter=FilterConfig(function="patient_check:keep"))
    assert [row["kept"] for row in rows(ask.output)] == [None] * 6


def test_ctrl_c_keeps_the_answers_and_drops_the_requests_in_flight(stub, ask, monkeypatch):
    from distillab.synthesize import synthesize as module

    class Pressed(module.StopRequest):
        def __enter__(self):
            stub.stop = self
            return super().__enter__()

    def hang(number, body):
        if number >= 3:
            stub.stop.received = signal.SIGINT
            stub.released.wait(30)
        return completion()

    monkeypatch.setattr(module, "StopRequest", Pressed)
    stub.script = hang
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="stopped: 3 of 6 answers are in"):
        ask(concurrency=1)
    assert time.monotonic() - started < 20
    assert len(rows(ask.output)) == 3


@pytest.fixture(scope="module")
def served(smollm2_dir, tmp_path_factory):
    """真的服务：``transformers serve``，权重是本机的 SmolLM2-135M-Instruct。"""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    environment.pop("PYTHONWARNINGS", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("transformers")), "serve", str(smollm2_dir),
             "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=output, stderr=output, env=environment,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo"}


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_local_model(
    served, smollm2_dir, tmp_path, monkeypatch
):
    import torch

    from distillab.generate.generator import TextGenerator
    from distillab.models.interface import PretrainedLM
    from distillab.models.pretrained import load_pretrained
    from distillab.models.tokenizer import load_tokenizer
    from distillab.synthesize.local_backend import LocalBackend

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tasks = [
        Task(country, [{"role": "user", "content": f"What is the capital of {country}?"}], city, {})
        for country, city in CAPITALS.items()
    ]
    sampling = SamplingConfig(temperature=0, max_new_tokens=24)
    config = SynthesizeConfig(sampling=sampling, filter=FilterConfig(regex=r"\b{answer}\b"))
    tokenizer = load_tokenizer(str(smollm2_dir))

    def prompt(task):
        return tokenizer.apply_chat_template(
            task.messages, add_generation_prompt=True, return_dict=False
        )

    backends = {
        "server": ServerBackend(
            ServerConfig(base_url=served, model=str(smollm2_dir), concurrency=1), sampling
        ),
        "local": LocalBackend(
            TextGenerator(
                PretrainedLM(load_pretrained(str(smollm2_dir), dtype=torch.float32)), tokenizer
            ),
            prompt, sampling, 4, name="SmolLM2",
        ),
    }  # fmt: skip
    found = {}
    for name, backend in backends.items():
        output = tmp_path / f"{name}.jsonl"
        report = synthesize(tasks, backend, config, output, provenance={}, seed=0)
        assert report.exit_code == 0
        assert report.kept >= 2
        found[name] = {
            row["id"]: (row["response"], row["finish_reason"], row["tokens"])
            for row in rows(output)
        }
        assert {row["id"] for row in kept_rows(output)} >= {"France"}
    assert "Paris" in found["server"]["France"][0]
    assert found["server"] == found["local"]


@pytest.mark.slow
def test_a_real_server_refuses_another_model_in_one_line(served, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = ServerConfig(base_url=served, model="no-such-model", concurrency=1, max_retries=0)
    sampling = SamplingConfig(temperature=0, max_new_tokens=4)
    with pytest.raises(
        DistillabError, match="answered HTTP 400 for model 'no-such-model': Server is"
    ):
        synthesize(
            TASKS, ServerBackend(config, sampling), SynthesizeConfig(sampling=sampling),
            tmp_path / "r.jsonl", provenance={}, seed=0,
        )  # fmt: skip
