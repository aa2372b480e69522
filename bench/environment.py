"""What the benchmark needs: a virtual environment, Node's packages, a Go program."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
OUT = ROOT / "bench" / "out"  # git-ignored
VENV = OUT / "venv"
PYTHON = VENV / "bin" / "python"
PIP = ("flask", "gunicorn", "fastapi", "uvicorn[standard]")
NPM = ("fastify@5", "mongodb@7")
GO_LIBRARIES = "/usr/share/gocode"  # of Debian's golang-mongodb-mongo-driver-dev


def prepare() -> None:
    """Makes what is not there yet. A peer that cannot be made has no figures."""
    if not shutil.which("wrk"):
        sys.exit("bench: wrk, the load generator, is missing: apt install wrk")
    if not PYTHON.exists():
        subprocess.run((sys.executable, "-m", "venv", VENV), check=True)
    pip = (PYTHON, "-m", "pip", "install", "-qq", "-r", ROOT / "requirements.txt")
    subprocess.run((*pip, *PIP), check=True)
    if shutil.which("npm") and not (OUT / "node_modules").exists():
        npm = ("npm", "install", "--prefix", OUT, "--no-audit", "--no-fund", *NPM)
        subprocess.run(npm, check=False)
    if shutil.which("go"):
        go = {"GO111MODULE": "off", "GOPATH": GO_LIBRARIES, "GOCACHE": str(OUT / "go")}
        build = ("go", "build", "-o", OUT / "go_server", PEERS / "go_server.go")
        subprocess.run(build, env=os.environ | go, check=False)


def describe() -> str:
    """Returns the machine and the versions that the figures are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(": ")[1] for line in lines if line.startswith("model name")}
    parts = [f"{os.cpu_count()} × {', '.join(names) or platform.machine()}"]
    parts += [platform.platform(), f"Python {platform.python_version()}"]
    for name in ("pymongo", *PIP):
        parts.append(f"{name} {metadata.version(name.split('[')[0])}")
    for name, argument in (("node", "--version"), ("go", "version")):
        if shutil.which(name):
            output = subprocess.check_output((name, argument), text=True)
            parts.append(f"{name} {output.split()[-2:][0].removeprefix(name)}")
    return ", ".join(parts)
