"""A web server of files that can misbehave: break connections, ignore ranges, hide sizes, pause, ask for a password."""

import base64
import http.server
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Site:
    """What a server does, and what it has done."""

    root: Path
    has_ranges: bool = True
    tells_size: bool = True
    """otherwise it refuses HEAD, and sends chunks"""
    breaks_after: list[int] = field(default_factory=list)
    """each answer with a file takes one number: bytes after which the connection breaks"""
    statuses: list[int] = field(default_factory=list)
    """each request takes one number: an error of HTTP"""
    pauses: list[float] = field(default_factory=list)
    """each answer with a file takes one number: seconds of silence in its middle"""
    login: str = ""
    """name:password to ask for"""
    version: str = "1"
    """of the files, for the ETag"""
    requests: list[str] = field(default_factory=list)
    """method, path with query, and range of each"""
    bytes_sent: int = 0


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Answers with files, ranges of files, and pages that list folders."""

    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *arguments):
        self.site = site
        super().__init__(*arguments)

    def do_GET(self):
        site, wanted = self.site, self.headers.get("Range", "")
        site.requests.append(f"{self.command} {self.path} {wanted}".strip())
        path = site.root / unquote(urlsplit(self.path).path).lstrip("/")
        login = f"Basic {base64.b64encode(site.login.encode()).decode()}"
        if site.statuses:
            return self.fail(site.statuses.pop(0))
        if site.login and self.headers.get("Authorization") != login:
            return self.fail(401)
        if self.command == "HEAD" and not site.tells_size:
            return self.fail(405)
        if not path.exists():
            return self.fail(404)
        if path.is_dir():
            names = [inner.name + "/" * inner.is_dir() for inner in sorted(path.iterdir())]
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in ("../", "?order=name", *names))
            return self.send(200, page.encode(), {"Content-Type": "text/html"})
        data, headers, status = path.read_bytes(), {"ETag": f'"{site.version}"'}, 200
        match = re.match(r"bytes=(\d+)-(\d*)", wanted)
        if match and site.has_ranges:
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send(status, data, headers, is_file=True)

    do_HEAD = do_GET

    def fail(self, status: int):
        self.send(status, b"", {})

    def send(self, status: int, data: bytes, headers: dict[str, str], is_file: bool = False):
        site, is_chunked = self.site, is_file and not self.site.tells_size
        self.send_response(status)
        headers = {**headers, **({"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": len(data)})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks_after = site.breaks_after.pop(0) if is_file and site.breaks_after else None
        pause = site.pauses.pop(0) if is_file and site.pauses else 0
        data = data[:breaks_after]
        middle = len(data) // 2
        try:
            for part in (data[:middle], data[middle:]):
                if part:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
                    site.bytes_sent += len(part)
                self.wfile.flush()
                time.sleep(pause)
                pause = 0
            if is_chunked and breaks_after is None:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has left
            breaks_after = 0
        self.close_connection = breaks_after is not None

    def log_message(self, *_):
        pass
