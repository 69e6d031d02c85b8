"""An EC2 instance's metadata service (version 2) on loopback, whose answers a test decides."""

import json
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SpotInstance:
    """A spot instance, without a notice at first: `address` of its metadata service, `log` of what was asked."""

    def __init__(self) -> None:
        self.notice: str | None = None
        self.recommendation: str | None = None
        self.refuse_tokens = False
        self.answers: list[int | str] = []  # to the next questions for a notice: a status, "cut" or "half"
        self.log: list[str] = []
        self._tokens: set[str] = set()
        self._watcher: tuple[Callable[[], bool], Callable[[], Any]] | None = None
        instance = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                instance._put(self)

            def do_GET(self) -> None:
                instance._get(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "SpotInstance":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def interrupt(self, seconds: float) -> None:
        """Announce that AWS takes the instance in `seconds`."""
        time = datetime.now(UTC) + timedelta(seconds=seconds)
        self.notice = json.dumps({"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ")})

    def expire_tokens(self) -> None:
        """Refuse the tokens handed out so far."""
        self._tokens.clear()

    def when_asked(self, condition: Callable[[], bool], action: Callable[[], Any]) -> None:
        """Call `action` once, after the first answer for which `condition` holds."""
        self._watcher = condition, action

    def _put(self, handler: BaseHTTPRequestHandler) -> None:
        lifetime = int(handler.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0"))
        if handler.path != "/latest/api/token" or not 1 <= lifetime <= 21_600:
            return _answer(handler, 400)
        token = uuid.uuid4().hex
        self._tokens.add(token)
        self.log.append("PUT token")
        _answer(handler, 200, token)

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.removeprefix("/latest/meta-data/")
        text = {
            "spot/instance-action": self.notice,
            "events/recommendations/rebalance": self.recommendation,
            "instance-life-cycle": "spot",
        }.get(path)
        status: int | str = 200 if text is not None else 404
        if self.refuse_tokens or handler.headers.get("X-aws-ec2-metadata-token") not in self._tokens:
            status = 401
        elif path == "spot/instance-action" and self.answers:
            status = self.answers.pop(0)
        self.log.append(f"GET {path} {status}")
        if status == "cut":
            handler.close_connection = True
        elif status == "half":
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            handler.wfile.write(b"{")
            handler.close_connection = True
        else:
            _answer(handler, int(status), text or "")
        if self._watcher and self._watcher[0]():
            (_, action), self._watcher = self._watcher, None
            action()


def _answer(handler: BaseHTTPRequestHandler, status: int, text: str = "") -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text.encode())
