"""一个什么都做得出来的假服务，OpenAI 兼容。"""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text="4", finish_reason="stop", **message):
    return {
        "model": "served",
        "choices": [{"message": {"content": text, **message}, "finish_reason": finish_reason}],
        "usage": {"completion_tokens": 2},
    }


class Stub(ThreadingHTTPServer):
    """``script(number, body)`` 决定第几个请求得到什么：正文，或 ``(状态, 正文, 头)``。"""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = lambda number, body: completion()
        self.bodies, self.keys, self.times = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # 客户端先挂断了

    def asked(self):
        return Counter(body["messages"][-1]["content"] for body in self.bodies)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.times.append(time.monotonic())
            stub.bodies.append(body)
            stub.keys.append(self.headers.get("Authorization"))
            stub.in_flight += 1
            stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
            number = len(stub.bodies) - 1
        try:
            reply = stub.script(number, body)
        finally:
            with stub.lock:
                stub.in_flight -= 1
        status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
