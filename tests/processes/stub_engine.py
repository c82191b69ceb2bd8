"""A program that serves as vLLM does, with a worker and with one more that makes a session of its own; or that fails to.

What it does is in its environment. STUB_DELAY: seconds until it listens. STUB_FAILS: "raises", "argument", "exits" or "never" (is
ready). STUB_DIES: at which answer. STUB_STEP: seconds a token. STUB_STUBBORN: its children ignore SIGTERM. STUB_NOTES: a file to
which it writes its command line and environment.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLEEP = ["sh", "-c", ("trap '' TERM; " if "STUB_STUBBORN" in os.environ else "") + "exec sleep 1000"]


class Handler(BaseHTTPRequestHandler):
    answers = 0

    def do_GET(self):
        self._begin()
        if self.path == "/v1/models":
            self.wfile.write(json.dumps({"data": [{"id": given.served_model_name, "owned_by": "vllm"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._begin()
        Handler.answers += 1
        if Handler.answers == int(os.environ.get("STUB_DIES", 0)):
            print("RuntimeError: the device has gone", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        for n in range(asked["max_tokens"]):
            time.sleep(float(os.environ.get("STUB_STEP", 0.001)))
            self._send({"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [65 + n]}]})
        self._send({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": asked["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self):
        self.send_response(200)
        self.end_headers()

    def _send(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--host", "--port", "--served-model-name"):
    parser.add_argument(name)
given, _ = parser.parse_known_args()

subprocess.Popen(SLEEP)
subprocess.Popen(["sh", "-c", 'setsid "$@" & exit', "sh", *SLEEP])  # whose parent ends at once
if notes := os.environ.get("STUB_NOTES"):
    with open(notes, "a") as file:
        file.write(json.dumps({"command": sys.argv[1:], "env": dict(os.environ)}) + "\n")
print("INFO loading", flush=True)
fails = os.environ.get("STUB_FAILS")
if fails == "argument":
    parser.error("unrecognized arguments: --warp")
if fails == "exits":
    sys.exit(3)
if fails == "never":
    time.sleep(1000)
time.sleep(float(os.environ.get("STUB_DELAY", 0.2)))
if fails == "raises":
    try:
        raise MemoryError("no room for 3 GiB of keys and values")
    except MemoryError as error:
        raise RuntimeError("Engine core initialization failed. See root cause above.") from error
ThreadingHTTPServer((given.host, int(given.port)), Handler).serve_forever()
