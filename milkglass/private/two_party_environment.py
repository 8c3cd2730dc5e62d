"""Makes the environment in which two-party inference runs: `python -m milkglass.private.two_party_environment`.

SPU 0.9.5 pins a numpy and a jax that milkglass must not be held to, so it gets a virtual environment of its own, at
`two-party` in milkglass's own (`sys.prefix`), with every package pinned. Beside it lies emp-wasm for garbled circuits,
where Node is installed; without Node only that part is left out. Run twice, it does nothing the second time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from milkglass.errors import MilkglassError, MissingExtraError, first_line, foreign_line

COMMAND: Final = "python -m milkglass.private.two_party_environment"
PACKAGES: Final = (
    "spu==0.9.5",
    "jax==0.4.34",
    "jaxlib==0.4.34",
    "numpy==1.26.4",
    "scipy==1.17.1",
    "ml_dtypes==0.5.4",
    "opt_einsum==3.4.0",
    "cachetools==8.0.2",
    "cloudpickle==3.1.3",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "termcolor==3.3.0",
)
NODE_PACKAGES: Final = {"emp-wasm": "0.3.2", "ee-typed": "0.1.1", "events": "3.3.0"}
_PYTHONS: Final = ((3, 10), (3, 11))  # SPU 0.9.5 has wheels for no others


@final
class MissingEnvironmentError(MissingExtraError):
    """The environment for two-party inference, or a part of it, is not there or cannot be made."""

    def __init__(self, words: str) -> None:
        MilkglassError.__init__(self, words)


def environment_folder() -> Path:
    """Where it lies, whether or not it has been made."""
    return Path(sys.prefix) / "two-party"


def find_environment() -> Path:
    """The interpreter in which SPU is installed. Raises MissingEnvironmentError with the one command that makes it."""
    folder = environment_folder()
    if _made(folder / "python.json") != list(PACKAGES) or not _python(folder).is_file():
        raise MissingEnvironmentError(f"two-party inference needs SPU in an environment of its own: {COMMAND}")
    return _python(folder)


def find_garbling() -> Path:
    """The module of emp-wasm, for Node. Raises MissingEnvironmentError with the one command that installs it."""
    folder = environment_folder()
    if _made(folder / "node.json") != _node_pins():
        raise MissingEnvironmentError(f"garbled circuits need Node and emp-wasm: install Node 20, then {COMMAND}")
    return _module(folder)


def make_environment(folder: Path | None = None) -> Path:
    """Make what is not there yet and say so, line by line; the interpreter. Raises MissingEnvironmentError."""
    folder = environment_folder() if folder is None else folder
    if _made(folder / "python.json") == list(PACKAGES):
        print(f"{folder}: SPU is there")
    else:
        if sys.version_info[:2] not in _PYTHONS:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise MissingEnvironmentError(
                f"SPU 0.9.5 runs on Python 3.10 and 3.11, this is {version}: use one of these"
            )
        print(f"{folder}: a virtual environment, and in it {', '.join(PACKAGES[:4])} and what they need (some 300 MB)")
        _call([sys.executable, "-m", "venv", "--clear", str(folder)], "the environment cannot be made")
        pip = [str(_python(folder)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _call([*pip, "--only-binary", ":all:", *PACKAGES], "SPU cannot be installed")
        _call([str(_python(folder)), "-c", "import spu, jax"], "SPU is installed and does not start")
        _mark(folder / "python.json", list(PACKAGES))
    _add_garbling(folder)
    return _python(folder)


def _add_garbling(folder: Path) -> None:
    if _made(folder / "node.json") == _node_pins():
        print(f"{folder}: emp-wasm is there")
        return
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("garbled circuits: left out, since Node is not installed; install Node 20 and run this again")
        return
    place = folder / "garbled"
    place.mkdir(exist_ok=True)
    (place / "package.json").write_text(json.dumps({"private": True, "dependencies": NODE_PACKAGES}))
    print(f"{place}: emp-wasm {NODE_PACKAGES['emp-wasm']} (20 MB)")
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    _call([npm, "install", "--prefix", str(place), *quiet], "emp-wasm cannot be installed")
    _mark(folder / "node.json", _node_pins())


def _call(command: Sequence[str], failure: str) -> None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise MissingEnvironmentError(f"{failure}: {command[0]}: {error.strerror or error}") from None
    if done.returncode:
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in told if "error" in line.lower()] or told or ["no reason given"]
        raise MissingEnvironmentError(f"{failure}: {foreign_line(errors[-1].strip())}")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _module(folder: Path) -> Path:
    return folder / "garbled" / "node_modules" / "emp-wasm" / "dist" / "src" / "ts" / "index.js"


def _node_pins() -> list[str]:
    return [f"{name}@{version}" for name, version in NODE_PACKAGES.items()]


def _made(marker: Path) -> object:
    """The pins of an installation that came to its end; None where it did not."""
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return None


def _mark(marker: Path, pins: list[str]) -> None:
    beside = marker.with_name(f".{marker.name}.{os.getpid()}.partial")
    beside.write_text(json.dumps(pins))
    beside.replace(marker)


def main() -> int:
    """The command; its exit code."""
    argparse.ArgumentParser(prog=COMMAND, description="Make the environment of two-party inference.").parse_args()
    try:
        print(f"ready: {make_environment()}")
    except (MilkglassError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
