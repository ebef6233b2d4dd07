"""`make app`: a page to try the methods on, with the small model that comes with the repository.

    python -m objectcompose.examples.app
    python -m objectcompose.examples.app --host 0.0.0.0 --port 8000    # for others in the network, too

Write a prompt, draw a box or mask per object, give reference pictures, choose a method. The page shows the picture,
the layout on it and the attention of each phrase, and gives the layout JSON and the Python lines that repeat it.
Nothing is downloaded, and nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from objectcompose.errors import ObjectComposeError
from objectcompose.examples.app_methods import Workshop
from objectcompose.examples.app_page import PAGE_STYLE, build_page, load_gradio, page_theme


MAX_UPLOAD = "5mb"
_MAX_WAITING = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; returns the exit code (2: something that it needs is missing)."""
    args = create_parser().parse_args(argv)
    try:
        launch_page(args.host, args.port, args.out, args.device, wait=True)
    except ObjectComposeError as error:
        print(f"app: {error}", file=sys.stderr)
        return 2
    return 0


def create_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description="Serve a page to try the methods on.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/app"), help="folder of layouts (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda; default: cuda if there is one")
    return parser


def launch_page(host: str, port: int, out: Path, device: str | None = None, wait: bool = False) -> Any:
    """Start the server.

    Args:
        host: address to listen on.
        port: 0 for a free one.
        out: folder of layouts.
        device: see `Workshop`.
        wait: return only when interrupted.

    Returns:
        The page; `local_url` says where it is, `close()` ends it.

    Raises:
        MissingPackageError: gradio is not installed.
        ObjectComposeError: toybox is missing, or device or port cannot be used.
    """
    gradio = load_gradio()
    if not 0 <= port < 2**16:
        raise ObjectComposeError(f"`--port` must be from 0 to {2**16 - 1}, got {port}.")
    page = build_page(Workshop(device), out).queue(max_size=_MAX_WAITING)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=page_theme(gradio),
            css=PAGE_STYLE,
        )
    except OSError as error:
        raise ObjectComposeError(f"`--port` {port} of `--host` {host!r} cannot be used: {error}") from error
    print(f"objectcompose: {url}", flush=True)
    if wait:
        page.block_thread()
    return page


if __name__ == "__main__":
    sys.exit(main())
