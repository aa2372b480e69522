"""What the benchmark runs on: its own virtual environment, Node modules, a Go program."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
OUT = BENCH / "out"  # git-ignored
VENV = OUT / "venv"
PYTHON = VENV / ("Scripts" if sys.platform == "win32" else "bin") / "python"
NODE_MODULES = OUT / "node" / "node_modules"
GO_PEER = OUT / "go" / "go_net_http"

PIP_PACKAGES = ("flask", "gunicorn", "fastapi", "uvicorn[standard]", "matplotlib")
NPM_PACKAGES = ("fastify@5", "mongodb@7")
GO_SOURCE = BENCH / "peers" / "go_net_http.go"
GO_DRIVER = "go.mongodb.org/mongo-driver"
DEBIAN_GOPATH = Path("/usr/share/gocode")  # golang-mongodb-mongo-driver-dev, for one
SETUP_SECONDS = 600


def prepare() -> None:
    """Makes what is not there yet. Exits with a line that says what is missing."""
    if not shutil.which("wrk"):
        sys.exit("bench: wrk, the load generator, is missing: apt install wrk")
    OUT.mkdir(exist_ok=True)
    requirements = (ROOT / "requirements.txt").read_text()
    make_once(VENV, requirements + repr(PIP_PACKAGES), make_venv)
    if shutil.which("npm"):
        make_once(NODE_MODULES.parent, repr(NPM_PACKAGES), install_node_modules)
    if shutil.which("go"):
        make_once(GO_PEER.parent, GO_SOURCE.read_text(), build_go_peer)


def make_once(folder: Path, recipe: str, make: Callable[[], None]) -> None:
    """Calls ``make`` unless the folder was made by the same recipe already."""
    stamp = folder / ".recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    print(f"bench: making {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        make()
    except (subprocess.SubprocessError, OSError) as error:
        output = getattr(error, "output", None) or ""
        print(f"bench: {folder.name}: {error}\n{output[-2000:]}", file=sys.stderr)
        if folder == VENV:
            sys.exit(1)
    else:
        stamp.write_text(recipe)


def make_venv() -> None:
    call(sys.executable, "-m", "venv", str(VENV))
    requirements = str(ROOT / "requirements.txt")
    call(str(PYTHON), "-m", "pip", "install", "-r", requirements, *PIP_PACKAGES)


def install_node_modules() -> None:
    folder = str(NODE_MODULES.parent)
    call("npm", "install", "--prefix", folder, "--no-audit", "--no-fund", *NPM_PACKAGES)


def build_go_peer() -> None:
    """Builds with the driver that Debian packages, else with the Go module proxy's."""
    folder = GO_PEER.parent
    common = {"GOCACHE": str(folder / "cache"), "GOFLAGS": ""}
    build = ("go", "build", "-o", str(GO_PEER))
    if (DEBIAN_GOPATH / "src" / GO_DRIVER).is_dir():
        gopath = {"GO111MODULE": "off", "GOPATH": str(DEBIAN_GOPATH)}
        call(*build, str(GO_SOURCE), **common, **gopath)
        return
    modules = {"GOPATH": str(folder / "path"), "GOFLAGS": "-modcacherw"}
    shutil.copy(GO_SOURCE, folder / "main.go")
    call("go", "mod", "init", "bench", cwd=folder, **common | modules)
    call("go", "get", f"{GO_DRIVER}@v1.12.2", cwd=folder, **common | modules)
    call(*build, ".", cwd=folder, **common | modules)


def call(*command: str, cwd: Path = OUT, **environment: str) -> None:
    """Runs a command to its end, quietly. Raises subprocess.SubprocessError."""
    subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SETUP_SECONDS,
    )


def missing_peers() -> dict[str, str]:
    """Returns why a peer is left out, by its name."""
    missing = {}
    if not (shutil.which("node") and (NODE_MODULES / "fastify").is_dir()):
        missing["fastify"] = "node or npm is not here, or npm install failed"
    if not shutil.which("go"):
        missing["go"] = "go is not here"
    elif not GO_PEER.exists():
        missing["go"] = (
            "its MongoDB driver cannot be had: apt install "
            "golang-mongodb-mongo-driver-dev, or let go reach its module proxy"
        )
    return missing


def flush_seconds() -> float:
    """Returns what it takes to flush 4 KB to the disk that holds MongoDB's data."""
    times = []
    with tempfile.TemporaryFile(dir=OUT) as file:
        for _ in range(200):
            os.write(file.fileno(), bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def machine() -> dict[str, str]:
    """Returns what the figures were measured on."""
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    versions = {
        "processor": f"{os.cpu_count()} x {', '.join(sorted(names)) or 'unknown'}",
        "system": platform.platform(),
        "fdatasync": f"{flush_seconds() * 1e3:.2f} ms",
        "python": platform.python_version(),
    }
    for name, argument in (("node", "--version"), ("go", "version")):
        if shutil.which(name):
            command = (name, argument)
            output = subprocess.check_output(command, text=True, timeout=30)
            versions[name] = output.strip().removeprefix("go version go")
    return versions
