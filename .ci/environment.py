"""Make the virtual environment .venv ready for a level: `demo`, `test` or `check`. Standard library alone.

    python3 .ci/environment.py LEVEL      from the repository's root

Whatever .venv is (missing, half-made, moved, damaged, a file), it is sound afterwards. A sound one costs about a
second: a stamp in it says for which pyproject.toml and constraints.txt it was made and what was installed, and every
installed file still has the size its package recorded. What is not sound is installed again, and if that does not
help, made anew.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
BEFORE = ROOT / "build" / "venv-before"
# Each level holds the ones before it.
LEVELS = {"demo": "", "test": "[test]", "check": "[test,check]"}
IMPORTS = "import milkglass, torch"


class UnsoundError(Exception):
    """What is wrong with the environment."""


def inspect() -> str:
    """In the environment's own Python: what is installed, a line each. Raises UnsoundError where a file is missing."""
    site = sysconfig.get_path("purelib")
    held = []
    for distribution in importlib.metadata.distributions(path=[site]):
        record = distribution.read_text("RECORD")
        if record is None:
            raise UnsoundError(f"{distribution.name} is half-installed")
        for name, _, size in csv.reader(record.splitlines()):
            if not size:
                continue
            try:
                found = os.stat(os.path.join(site, name)).st_size  # noqa: PTH116, PTH118 - forty thousand of them
            except OSError:
                raise UnsoundError(f"{name} is missing") from None
            if found != int(size):
                raise UnsoundError(f"{name} is damaged")
        held.append(f"{distribution.name}=={distribution.version}")
    package = importlib.util.find_spec("milkglass")
    if package is None or package.origin is None or Path(package.origin).resolve().parent.parent != ROOT:
        raise UnsoundError("milkglass is not installed from this folder")
    command = VENV / "bin" / "milkglass"
    if not command.is_file() or str(PYTHON) not in command.read_text():
        raise UnsoundError("the command `milkglass` is missing, or another environment's")
    return "\n".join(sorted(held))


def run(*arguments: str, quiet: bool = False) -> str:
    """What the environment's Python answers, isolated from the user's own packages and variables."""
    try:
        done = subprocess.run(
            [str(PYTHON), "-I", *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
        )
    except OSError as error:
        raise UnsoundError(f"its Python does not start ({error.strerror})") from None
    if done.returncode != 0:
        last = (done.stderr or "").strip().splitlines()[-1:]
        raise UnsoundError(last[0] if last else f"{' '.join(arguments[:3])} failed")
    return done.stdout


def wanted() -> str:
    """What the stamp's first line is for the files as they are now."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def stamp(level: str) -> Path:
    """The stamp of a level: the digest of `wanted`, then what was installed."""
    return VENV / f"milkglass-{level}.stamp"


def check(level: str) -> None:
    """Raises UnsoundError unless the environment is what the stamp says it was."""
    if not stamp(level).is_file():
        raise UnsoundError("not installed")
    digest, *lines = stamp(level).read_text().splitlines()
    if digest != wanted():
        raise UnsoundError("pyproject.toml or constraints.txt has changed")
    gone = set(lines) - set(run(__file__, "inspect", quiet=True).splitlines())
    if gone:
        raise UnsoundError(f"{min(gone)} is gone")
    run("-c", IMPORTS, quiet=True)


def install(level: str) -> None:
    """Install into the environment there is, and stamp it. Raises UnsoundError."""
    run("-c", "import sys; sys.exit('its Python is older than 3.11' if sys.version_info < (3, 11) else 0)", quiet=True)
    run("-m", "pip", "--version", quiet=True)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt")
    print("milkglass: installing torch", flush=True)
    run(*pip, "torch")
    print(f"milkglass: installing milkglass{LEVELS[level]} and what it needs", flush=True)
    run(*pip, "--editable", f".{LEVELS[level]}")
    held = run(__file__, "inspect", quiet=True)
    run("-c", IMPORTS, quiet=True)
    for lower in list(LEVELS)[: list(LEVELS).index(level) + 1]:
        new = stamp(lower).with_suffix(".new")
        new.write_text(f"{wanted()}\n{held}")
        new.replace(stamp(lower))


def remove(path: Path) -> None:
    """Nothing is left at that path; what a link there points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def make_anew(level: str) -> None:
    """A new environment in place of the old one, which comes back if that fails (no network, say)."""
    remove(BEFORE)
    if VENV.is_symlink() or VENV.exists():
        BEFORE.parent.mkdir(exist_ok=True)
        VENV.rename(BEFORE)
    try:
        print("milkglass: making .venv (a few minutes the first time)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        install(level)
    except BaseException:
        if BEFORE.is_symlink() or BEFORE.exists():
            remove(VENV)
            BEFORE.rename(VENV)
        raise
    remove(BEFORE)


def main(level: str) -> int:
    """Check; else install; else make anew and install."""
    try:
        check(level)
        return 0
    except UnsoundError as reason:
        print(f"milkglass: .venv: {reason}", flush=True)
    if PYTHON.is_file():
        try:
            install(level)
            return 0
        except UnsoundError as reason:
            print(f"milkglass: .venv: {reason}; making it anew", flush=True)
    try:
        make_anew(level)
        return 0
    except (UnsoundError, OSError, subprocess.CalledProcessError) as reason:
        print(f"milkglass: .venv could not be made: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:] == ["inspect"]:
        try:
            print(inspect())
        except UnsoundError as reason:
            sys.exit(str(reason))
    elif len(sys.argv) == 2 and sys.argv[1] in LEVELS:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(f"usage: environment.py {'|'.join(LEVELS)}")
