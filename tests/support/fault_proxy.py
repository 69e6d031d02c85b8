"""An HTTP proxy between a client and an object store that injects faults, reproducibly, in a process of its own.

Whether request n of a set of rules meets a fault depends on the seed and n alone. Loopback only; the client's
request goes on byte for byte, `Host` included, so that its signature stays valid.
"""

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_ERRORS = {  # what a store that is overloaded, broken or being restarted answers, without having done anything
    "503": ("503 Slow Down", "SlowDown"),
    "500": ("500 Internal Server Error", "InternalError"),
    "429": ("429 Too Many Requests", "TooManyRequests"),
    "403": ("403 Forbidden", "AccessDenied"),
}
FAULTS = (*_ERRORS, "reset", "truncate", "delay", "stall", "lost_ack")


@dataclass(frozen=True)
class Rule:
    """Requests that meet a fault; of several rules the first one that fires counts.

    Attributes:
        fault: `503`, `500`, `429`, `403` (answered without asking the store), `reset` (connection reset before the
            store is asked), `truncate` (the store's answer breaks off halfway), `delay` (the answer comes `seconds`
            later), `stall` (the answer stops halfway for `seconds`, then breaks off), `lost_ack` (the store did it, the
            client sees a reset).
        probability: 0..1.
        method: HTTP method; empty for every one.
        path: Part of the request's target (path and query); empty for every one.
        count: The fault happens at most so many times; None for no limit.
        seconds: Of `delay` and `stall`.
    """

    fault: str
    probability: float = 1.0
    method: str = ""
    path: str = ""
    count: int | None = None
    seconds: float = 0.2

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault = {self.fault!r}: must be one of {', '.join(FAULTS)}")


def mixed(probability: float, **fields: object) -> list[Rule]:
    """Rules by which a request meets, with this probability in all, one of the faults that leave no one waiting."""
    faults = ("503", "500", "reset", "truncate", "lost_ack")
    # A rule is only asked when those before it did not fire.
    shares = [probability / len(faults) / (1 - n * probability / len(faults)) for n in range(len(faults))]
    return [Rule(fault, share, **fields) for fault, share in zip(faults, shares, strict=True)]  # type: ignore[arg-type]


class FaultProxy:
    """Passes requests on to `127.0.0.1:backend_port` (or another host); `endpoint` is the proxy's own URL.

    A backend that is away is met as the client would meet it: the connection closes without an answer.
    """

    def __init__(self, backend_port: int, seed: int = 0, backend_host: str = "127.0.0.1") -> None:
        command = [sys.executable, str(Path(__file__)), backend_host, str(backend_port), str(seed)]
        # Its standard input is the control channel: when this process dies, the proxy reads the end and goes, too.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()
        self.port = int(self._ask("port"))
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Replace all rules and count requests from 0 again; requests under way keep the fault that they met."""
        self._ask(json.dumps([asdict(rule) for rule in rules]))

    def counts(self) -> Counter[str]:
        """Since the start: `requests`, every fault by its name, `backend_away`, and `PUT`, `GET`, ... by method."""
        return Counter(json.loads(self._ask("counts")))

    def asked(self) -> list[tuple[str, str]]:
        """Every different request since the start, as method and target (path and query)."""
        return [(method, target) for method, target in json.loads(self._ask("asked"))]

    def close(self) -> None:
        """End the proxy."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, command: str) -> str:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the fault proxy has ended")
        return answer.strip()


class _Disconnect(Exception):
    """The client's connection is to end without (the rest of) an answer."""


@dataclass
class _Faults:
    """Decides about requests and counts."""

    seed: int
    rules: list[Rule] = field(default_factory=list)
    left: list[int | None] = field(default_factory=list)
    request: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    asked: set[tuple[str, str]] = field(default_factory=set)

    def replace(self, rules: list[Rule]) -> None:
        self.rules, self.left, self.request = rules, [rule.count for rule in rules], 0

    def decide(self, method: str, target: str) -> Rule | None:
        self.counts["requests"] += 1
        self.asked.add((method, target))
        self.counts[method] += 1
        self.request += 1
        for index, rule in enumerate(self.rules):
            draw = random.Random(f"{self.seed}/{self.request}/{index}").random()
            left = self.left[index]
            if (rule.method in ("", method)) and rule.path in target and draw < rule.probability and left != 0:
                if left is not None:
                    self.left[index] = left - 1
                self.counts[rule.fault] += 1
                return rule
        return None


@dataclass
class _Message:
    """The head of an HTTP message: its bytes, its first line's words, how its body is delimited, what follows it.

    Attributes:
        body: `none`, `chunked`, `length` or `to_the_end` (of the connection).
        length: Of the body in bytes, where `body` is `length`.
        closes: Whether the connection ends after this message.
    """

    raw: bytes
    words: list[str]
    headers: dict[str, str]
    body: str
    length: int
    closes: bool


class _Connection:
    """One client's connection, and the one to the store that goes with it."""

    def __init__(
        self, faults: _Faults, backend: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.faults, self.backend, self.reader, self.writer = faults, backend, reader, writer
        self.store: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def serve(self) -> None:
        try:
            while await self._exchange():
                pass
        except (_Disconnect, OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            self._close_store()
            self.writer.close()

    async def _exchange(self) -> bool:
        """One request and its answer; returns whether the connection goes on."""
        request = await _read_head(self.reader)
        rule = self.faults.decide(request.words[0], request.words[1])
        fault = rule.fault if rule else ""
        if fault == "reset":
            self._reset()
        if fault in _ERRORS:
            return await self._refuse(request, *_ERRORS[fault])
        if rule and fault == "delay":
            await asyncio.sleep(rule.seconds)
        answer, source = await self._forward(request)
        if fault == "lost_ack":
            await _send(_body(answer, source), None)
            self._reset()
        if rule and fault in ("truncate", "stall"):
            await self._break_off(answer, source, rule.seconds if fault == "stall" else 0)
        self.writer.write(answer.raw)
        await _send(_body(answer, source), self.writer)
        await self.writer.drain()
        if answer.closes:
            self._close_store()
        return not (answer.closes or request.closes)

    async def _forward(self, request: _Message) -> tuple[_Message, asyncio.StreamReader]:
        """Send the request on; returns the head of the final answer and where its body comes from."""
        try:
            if self.store is None or self.store[0].at_eof():
                self._close_store()
                self.store = await asyncio.open_connection(*self.backend, limit=2**20)
            source, sink = self.store
            sink.write(request.raw)
            if "expect" in request.headers:
                answer = await _read_head(source, request)
                if answer.words[1] != "100":
                    answer.closes = True  # the client will not send the body any more
                    return answer, source
                self.writer.write(answer.raw)
                await self.writer.drain()
            # A store may answer before it has read everything, so both directions are served at once.
            upload = asyncio.ensure_future(_send(_body(request, self.reader), sink))
            answered = asyncio.ensure_future(_read_head(source, request))
            try:
                await asyncio.wait((upload, answered), return_when=asyncio.FIRST_COMPLETED)
                if not answered.done() and upload.exception() is not None:
                    await asyncio.wait((answered,), timeout=1)  # a refusal may have come before the connection broke
                    answered.cancel()
                answer = await answered
                while answer.words[1] == "100":
                    answer = await _read_head(source, request)
                answer.closes |= not upload.done()
                return answer, source
            finally:
                answered.cancel()
                upload.cancel()
                await asyncio.wait((upload, answered))
        except (OSError, EOFError, asyncio.CancelledError):
            self.faults.counts["backend_away"] += 1
            raise _Disconnect from None

    async def _refuse(self, request: _Message, status: str, code: str) -> bool:
        """Answer with an error of the store's, which is not asked."""
        expects = "expect" in request.headers
        if not expects:  # otherwise the client has not sent the body yet and will not after this
            await _send(_body(request, self.reader), None)
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Injected fault</Message></Error>".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n" if expects else "\r\n"
        self.writer.write(head.encode() + (b"" if request.words[0] == "HEAD" else body))
        await self.writer.drain()
        return not (expects or request.closes)

    async def _break_off(self, answer: _Message, source: asyncio.StreamReader, seconds: float) -> None:
        """Half of the answer's body, or of its head where there is no body to speak of; then silence; then the end."""
        if answer.body == "none" or (answer.body == "length" and answer.length < 2):
            self.writer.write(answer.raw[: len(answer.raw) // 2])
        else:
            self.writer.write(answer.raw)
            left = answer.length // 2
            async for data in _body(answer, source):
                self.writer.write(data[: left or len(data) // 2])
                left -= len(data)
                if left <= 0:
                    break
        await self.writer.drain()
        await asyncio.sleep(seconds)
        raise _Disconnect

    def _reset(self) -> None:
        """End the client's connection by a TCP reset."""
        opened: socket.socket = self.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise _Disconnect

    def _close_store(self) -> None:
        if self.store is not None:
            self.store[1].close()
            self.store = None


async def _read_head(reader: asyncio.StreamReader, request: _Message | None = None) -> _Message:
    """The head of a request, or of the answer to `request`."""
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    words = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if request and (request.words[0] == "HEAD" or words[1] in ("100", "204", "304")):
        body = "none"
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        body = "chunked"
    elif "content-length" in headers:
        body = "length"
    else:
        body = "to_the_end" if request else "none"
    length = int(headers["content-length"]) if body == "length" else 0
    closes = body == "to_the_end" or "close" in headers.get("connection", "").lower()
    return _Message(raw, words, headers, body, length, closes)


async def _body(message: _Message, source: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A message's body as it is on the wire."""
    if message.body == "chunked":
        size = -1
        while size:
            line = await source.readline()
            size = int(line.split(b";")[0], 16)
            yield line + (await source.readexactly(size + 2) if size else b"")
        while line != b"\r\n":  # trailers
            line = await source.readline()
            yield line
    elif message.body == "to_the_end":
        while data := await source.read(2**16):
            yield data
    elif message.body == "length":
        left = message.length
        while left:
            data = await source.read(min(left, 2**16))
            if not data:
                raise EOFError
            left -= len(data)
            yield data


async def _send(body: AsyncIterator[bytes], sink: asyncio.StreamWriter | None) -> None:
    """Write a body on; None throws it away."""
    async for data in body:
        if sink is not None:
            sink.write(data)
            await sink.drain()


async def _run(backend: tuple[str, int], seed: int) -> None:
    faults = _Faults(seed)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _Connection(faults, backend, reader, writer).serve()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20, backlog=1024)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def obey(line: str) -> None:
        if line == "port":
            print(server.sockets[0].getsockname()[1], flush=True)
        elif line == "counts":
            print(json.dumps(faults.counts), flush=True)
        elif line == "asked":
            print(json.dumps(sorted(faults.asked)), flush=True)
        else:
            faults.replace([Rule(**fields) for fields in json.loads(line)])
            print("done", flush=True)

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(obey, line.strip())
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_run((sys.argv[1], int(sys.argv[2])), int(sys.argv[3])))
