"""Serve a recipe: python -m fastvl_lab.serve --checkpoint tiny-qwen2.5-vl --recipe fastest --port 8000"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastvl_lab.errors import FastvlError, require
from fastvl_lab.lab import Lab
from fastvl_lab.serve.app import create_app
from fastvl_lab.serve.connections import uvicorn_options
from fastvl_lab.serve.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, serve until a signal comes, and finish what is running; arguments: those of the process, if None."""
    given = _parser().parse_args(arguments)
    try:
        uvicorn = require("uvicorn", "serve")
        settings = Settings(
            max_queue=given.max_queue,
            timeout=given.timeout,
            max_body=given.max_body,
            max_tokens=given.max_tokens,
            api_key=given.api_key or os.environ.get("FASTVL_LAB_API_KEY") or None,
            served_name=given.served_model_name,
            origins=tuple(given.allow_origins),
            image_hosts=tuple(given.allow_image_hosts),
            max_connections=given.max_connections,
            warm_up=tuple(given.warm_up),
        )
        lab = Lab(given.checkpoint, device=given.device, dtype=given.dtype, session_len=given.session_len)
        app = create_app(lab, given.recipe, settings)
    except FastvlError as error:
        sys.exit(f"{error}")
    address = {"host": given.host, "port": given.port, "ssl_certfile": given.ssl_certfile, "ssl_keyfile": given.ssl_keyfile}
    uvicorn.run(app, timeout_graceful_shutdown=int(given.timeout) + 1, **address, **uvicorn_options(settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastvl_lab.serve", description=__doc__)
    defaults = Settings()
    parser.add_argument("--checkpoint", required=True, help="a folder, a hub id, a built-in checkpoint, or random:<hub id>")
    parser.add_argument("--recipe", default="fastest", help="a recipe's text (default fastest)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default CUDA where present)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default the checkpoint's on CUDA, float32 on a CPU)")
    parser.add_argument("--session-len", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="default 8000; 0 for any that is free")
    parser.add_argument("--max-queue", type=int, default=defaults.max_queue, help=f"requests that may wait ({defaults.max_queue})")
    parser.add_argument("--timeout", type=float, default=defaults.timeout, help=f"seconds a request ({defaults.timeout:g})")
    parser.add_argument("--max-body", type=int, default=defaults.max_body, help=f"bytes a request ({defaults.max_body})")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        help="tokens of an answer if a request does not say (default all that a session has room for)",
    )
    parser.add_argument(
        "--max-connections", type=int, default=defaults.max_connections, help=f"open at once ({defaults.max_connections})"
    )
    parser.add_argument("--ssl-certfile", type=_file, metavar="FILE", help="serve https with this certificate")
    parser.add_argument("--ssl-keyfile", type=_file, metavar="FILE", help="and its key, where the certificate's file has none")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: the checkpoint's name)")
    parser.add_argument("--api-key", help="what clients must send as a bearer token; also FASTVL_LAB_API_KEY")
    parser.add_argument(
        "--allow-image-hosts", nargs="*", default=[], metavar="HOST", help="fetch images from these hosts, or host:port"
    )
    parser.add_argument(
        "--allow-origins", nargs="*", default=[], metavar="ORIGIN", help="pages that may ask, besides this machine's"
    )
    parser.add_argument(
        "--warm-up", nargs="*", default=[], type=_size, metavar="WIDTHxHEIGHT", help="sizes to serve before the first"
    )
    return parser


def _file(text: str) -> str:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; it must be from 0 to 65535")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; it reads WIDTHxHEIGHT, such as 448x448")
    return int(width), int(height)


if __name__ == "__main__":
    main()
