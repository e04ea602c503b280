"""一个只读的假 hub：把 ``ROOT/{models,datasets}/NAMESPACE/NAME`` 当作仓库，照 hub 的 API 给出清单与文件。"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """``asked`` 是问过的 ``(方法, 路径)``。"""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked = root, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path.strip("/")
        hub.asked.append((self.command, path))
        parts = path.removeprefix("api/").split("/")
        if parts[0] not in ("models", "datasets"):
            parts.insert(0, "models")  # /NAMESPACE/NAME/resolve/...：模型没有前缀
        repository = hub.root.joinpath(*parts[:3])
        verb, rest = (parts[3:] or [""])[0], parts[5:]  # 版本在两者之间，只有一个
        if len(parts) < 3 or not repository.is_dir():
            self.send(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        elif verb == "resolve":
            self.send_file(repository.joinpath(*rest))
        elif verb == "tree" and (under := repository.joinpath(*rest)).is_dir():
            self.send(200, [entry(path, repository) for path in sorted(under.iterdir())])
        elif verb == "tree":
            self.send(404, {"error": "no directory"}, {"X-Error-Code": "EntryNotFound"})
        else:
            files = [file for file in sorted(repository.rglob("*")) if file.is_file()]
            names = [{"rfilename": str(file.relative_to(repository))} for file in files]
            self.send(200, {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": names})

    do_HEAD = do_GET

    def send_file(self, file):
        headers = {"X-Repo-Commit": COMMIT}
        if not file.is_file():
            self.send(404, {"error": "no file"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        data, status = file.read_bytes(), 200
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self.send(status, data, headers)

    def send(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def entry(path, repository):
    name = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    digest = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest}
