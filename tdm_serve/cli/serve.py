"""`tdm-serve serve`: the HTTP service and its page."""

from __future__ import annotations

import argparse
from importlib import import_module

from tdm_serve.cli import options

SERVER = "tdm_app.server"  # by name: the SDK does not import the app
MAX_PORT = 65_535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on which address."""
    options.add_model_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=options.whole_number(0, MAX_PORT), default=8000, help="(default: 8000)")
    parser.add_argument(
        "--max-batch", type=options.whole_number(1), default=8, help="most pictures in one batch (default: 8)"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="serve the API without the web page")


def run(args: argparse.Namespace) -> int:
    """Serves until interrupted."""
    return import_module(SERVER).run_server(
        model=args.model,
        host=args.host,
        port=args.port,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        max_batch=args.max_batch,
        page=args.page,
    )
