"""A server that answers as an OpenAI-compatible engine does, and keeps every core busy for a while after each answer.

As vLLM for CPUs does, whose workers spin. `python neighbour.py SECONDS` prints its port; it ends with its standard input.
`python neighbour.py SECONDS asleep` sleeps for as long before its answer's end instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECONDS, ASLEEP = float(sys.argv[1]), "asleep" in sys.argv[2:]


def burn() -> None:
    for _ in range(os.cpu_count() or 1):
        if os.fork() == 0:
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                pass
            os._exit(0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._begin("text/event-stream")
        for number in range(4):
            time.sleep(0.005)
            self._say({"choices": [{"index": 0, "delta": {"content": f"{number} "}}]})
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0}}
        self._say({"choices": [], "usage": usage})
        if ASLEEP:
            time.sleep(SECONDS)
        self.wfile.write(b"data: [DONE]\n\n")
        if not ASLEEP:
            burn()

    def _say(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
