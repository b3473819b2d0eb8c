"""Real MLflow servers on the loopback, a private PostgreSQL, and a proxy that loses, holds or refuses answers."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_SECONDS = 300.0  # only so that a server that never starts ends the test
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tethered(command: list[str], ending: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a server in a process group of its own, which gets the signal ``ending`` when this process dies."""
    # The shell reads a pipe that nothing is written to: it ends with the process that holds its other end.
    script = f'("$@"; kill -{ending} 0) & cat > /dev/null; kill -{ending} 0'
    shell = ["sh", "-c", script, "sh", *command]
    return subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True, **options)


class Server:
    """``mlflow server`` with a backend store, that may be killed and started again."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.backend, self.port = folder, backend, free_port()
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start it; ``ready`` waits for it."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            self.backend,
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        with open(self.folder / "log", "ab") as log:
            self.process = tethered(command, "KILL", env=os.environ | QUIET, stdout=log, stderr=log)

    def ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"the server did not start: {(self.folder / 'log').read_text()}")

    def start(self) -> None:
        self.launch()
        self.ready()

    def kill(self) -> None:
        """As a power cut: no process of it gets to end anything."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres, where they are installed."""
    found = shutil.which("postgres")
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places = [Path(found).resolve().parent] if found else packaged
    return next((place for place in places if (place / "initdb").exists()), None)


class Postgres:
    """A private cluster in a folder of its own; PostgreSQL refuses to run as root."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.port = programs, free_port()
        self.user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="iris-postgres-"))
        if self.user:
            shutil.chown(self.folder, self.user)
        self._run("initdb", "-D", str(self.folder / "data"), "-A", "trust", "-U", "iris", "--no-sync")
        command = [
            str(programs / "postgres"),
            "-D",
            str(self.folder / "data"),
            "-c",
            "listen_addresses=127.0.0.1",
            "-p",
            str(self.port),
            "-k",
            str(self.folder),
            "-c",
            "fsync=off",
        ]
        self.process = tethered(
            command, "QUIT", user=self.user, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), check=False):
            assert self.process.poll() is None, "PostgreSQL did not start"
            time.sleep(0.1)

    def database(self, name: str) -> str:
        """The URI of a new, empty database."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "iris", name)
        return f"postgresql+psycopg2://iris:unused@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # its processes may still be ending

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        return subprocess.run(
            [self.programs / program, *arguments],
            user=self.user,
            cwd=self.folder,
            check=check,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode


class Proxy(ThreadingHTTPServer):
    """Hands each request on to a server, and its answer back, unless ``judge`` says otherwise.

    Args:
        judge: called with the method, the path and the body, once the server has been sent the request and before its
            answer is read; it returns "pass", or "lose": the answer is read, and the connection closed without it.
    """

    daemon_threads = True

    def __init__(self, port: int, judge: Callable[[str, str, bytes], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.judge = port, judge
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        server = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=START_SECONDS)
        try:
            kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            server.request(self.command, self.path, body, kept)
            lost = self.server.judge(self.command, path, body) == "lose"
            answer = server.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # the server died
            lost = True
        finally:
            server.close()
        if lost:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on

    def log_message(self, *arguments: object) -> None:
        pass
