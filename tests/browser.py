"""Pages in a headless Chromium, served from this machine: what their scripts did, and what the console said."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-proxy-server --disable-background-networking"
    " --disable-component-update --no-first-run --enable-logging=stderr --virtual-time-budget=20000 --dump-dom"
).split()


def find() -> str | None:
    """The browser of this machine, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def ask(folder: Path, script: str) -> tuple[Any, list[str]]:
    """What `script` answers, and the console's lines.

    `script` is the body of an async function; it has `open(page)`, which opens a page of `folder` in a frame and gives
    its window once it is loaded, and `later()`, a moment in which the browser does what it has queued.
    """
    (folder / "asks.html").write_text(_PAGE.replace("SCRIPT", script), encoding="utf-8")
    program = find()
    assert program is not None
    with _served(folder) as address:
        profile = f"--user-data-dir={folder / 'profile'}"
        command = [program, *_FLAGS, profile, f"{address}/asks.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


_PAGE = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="answer"></pre><script>
const later = () => new Promise((done) => setTimeout(done, 100));
const open = (page) => new Promise((done) => {
  const frame = document.createElement("iframe");
  Object.assign(frame, { width: 1400, height: 900, src: page, onload: () => done(frame.contentWindow) });
  document.body.append(frame);
});
(async () => { SCRIPT })().catch((error) => ({ error: String(error) }))
  .then((answer) => { document.getElementById("answer").textContent = JSON.stringify(answer); });
</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Requests are not the tests' output."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
