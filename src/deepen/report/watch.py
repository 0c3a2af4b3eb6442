"""The page of a run, served on this machine while the run goes on."""

from collections.abc import Callable
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, Final

from deepen.errors import DataError, DeepenError, OutputError
from deepen.report.page import render_report
from deepen.report.read import watch_run

_HERE: Final = "127.0.0.1"
_NAMES: Final = (_HERE, "localhost")
# Seconds between reloads.
_RELOAD: Final = 5
# Charts are drawn by a library that is not safe with threads.
_drawing = Lock()


class WatchServer(ThreadingHTTPServer):
    """Serves the page of one run at `url`, to this machine only, made anew for every request."""

    daemon_threads = True

    def __init__(self, run: Path, port: int) -> None:
        """Begin to listen.

        Args:
            run: the run directory.
            port: 0 for any that is free.

        Raises:
            DataError: there is no such directory.
            OutputError: the port cannot be had.
        """
        if not run.is_dir():
            raise DataError(f"{run}: no such directory; give the directory of a run")
        try:
            super().__init__((_HERE, port), partial(_Handler, page=partial(watch_page, run)))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"port {port}: {why}; choose another with --port") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{_HERE}:{self.server_port}/"


def watch_page(run: Path) -> tuple[int, str]:
    """Return the HTTP status and the page of a run as it stands; it reloads itself until the run ends."""
    with _drawing:
        try:
            report = watch_run(run)
            return 200, render_report(report, reload=None if report.outcome else _RELOAD)
        except DeepenError as error:
            # A run that has only begun lacks its first records.
            head = f'<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="{_RELOAD}">'
            return 503, f"{head}<title>{escape(run.name)}</title><p>Nothing to show yet: {escape(str(error))}"


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # browsers open connections that they may never use

    def __init__(self, *args: Any, page: Callable[[], tuple[int, str]]) -> None:
        self._page = page
        super().__init__(*args)

    def do_GET(self) -> None:
        # A page of another site may make its own name mean this machine; it must not read this.
        if self.headers.get("Host", _HERE).partition(":")[0] not in _NAMES:
            self.send_error(403, "ask for localhost")
        elif self.path.partition("?")[0] != "/":
            self.send_error(404)
        else:
            status, page = self._page()
            self._answer(status, page.encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
