"""A server that answers the Hugging Face client as the Hub does; ROOT/org/name/BRANCH/ holds the files."""

import http.server
import json
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMITS = {"main": "a" * 40, "refs/convert/parquet": "b" * 40}
REVISION = "(refs/convert/parquet|[^/]+)"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Facts about a data set, lists of its files, and the files themselves or ranges of them."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *arguments):
        self.root = root
        super().__init__(*arguments)

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        match = re.match(rf"/api/datasets/(\w+/[\w-]+)(?:/(revision|tree)/{REVISION}(?:/(.*))?)?$", path)
        match = match or re.match(rf"/datasets/(\w+/[\w-]+)/(resolve)/{REVISION}/(.*)$", path)
        if not match:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        name, what, revision, rest = match.groups()
        branch = {commit: branch for branch, commit in COMMITS.items()}.get(revision, revision or "main")
        folder = self.root / name / branch
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not files:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        target = folder / (rest or "")
        if not target.exists() or (what == "resolve" and not target.is_file()):
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        if what == "resolve":
            return self.send_file(target.read_bytes(), COMMITS[branch])
        if what == "tree":
            recursive = parse_qs(url.query)["recursive"] == ["true"]
            return self.answer(200, [entry(p, folder) for p in target.glob("**/*" if recursive else "*")])
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
        self.answer(200, {"id": name, "sha": COMMITS[branch], "private": False, "tags": [], "siblings": siblings})

    do_HEAD = do_GET

    def send_file(self, data: bytes, commit: str):
        headers = {"ETag": '"e"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            return self.answer(206, data[first : last + 1], headers)
        self.answer(200, data, headers)

    def answer(self, status: int, body: object, headers: dict = {}):  # noqa: B006
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def entry(path: Path, folder: Path) -> dict:
    """What the Hub lists of a file or a folder."""
    facts = {"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(folder)), "oid": "c" * 40}
    return facts if path.is_dir() else {**facts, "size": path.stat().st_size}
