#!/usr/bin/env python3
"""Makes the patched llama.cpp tree that CMakeLists.txt builds, and prints its folder.

The source is the ``vendor/llama.cpp`` of the pinned llama-cpp-python sdist (``upstream.json``), fetched with pip and
checked against its sha256, or taken from the path in ``MILLION_LLAMA_CPP_SDIST``. The patches of ``patches/series``
are applied with ``git apply``, which refuses any fuzz, and every touched file is compared with ``patches/SHA256SUMS``.

The folder's name carries a digest of sdist and patches, so a changed series makes a new tree and a finished tree is
never touched again. Work happens under a temporary name that is renamed at the end.

``--record`` rewrites ``patches/SHA256SUMS`` instead of comparing (after the series was changed on purpose).

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATCHES = HERE / "patches"
# Folders of the sdist that a tree holds, and what they are called there.
WANTED = {"vendor/llama.cpp/": "llama.cpp", "llama_cpp/": "llama_cpp"}


class PrepareError(Exception):
    pass


def sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def series() -> list[Path]:
    names = [line.strip() for line in (PATCHES / "series").read_text().splitlines()]
    return [PATCHES / name for name in names if name and not name.startswith("#")]


def tree_digest(pin: dict[str, str]) -> str:
    h = hashlib.sha256(pin["sha256"].encode())
    for patch in series():
        h.update(patch.name.encode() + b"\0" + patch.read_bytes())
    return h.hexdigest()[:16]


def fetch(pin: dict[str, str], downloads: Path) -> Path:
    """Returns the sdist's path, its sha256 checked."""
    given = os.environ.get("MILLION_LLAMA_CPP_SDIST")
    name = f"{pin['name'].replace('-', '_')}-{pin['version']}.tar.gz"
    path = Path(given) if given else downloads / name
    if given and not path.is_file():
        raise PrepareError(f"MILLION_LLAMA_CPP_SDIST={given}: no such file; it must be {name}")
    if not path.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as tmp:
            requirement = Path(tmp, "requirement.txt")
            requirement.write_text(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--no-binary", ":all:", "--require-hashes", "--dest", tmp, "--requirement", str(requirement),
            ]  # fmt: skip
            # pip asks the sdist for its metadata, which must not start a build of llama.cpp
            env = dict(os.environ, CMAKE_ARGS="-DLLAMA_BUILD=OFF")
            done = subprocess.run(command, env=env, stdout=sys.stderr)
            if done.returncode != 0 or not Path(tmp, name).is_file():
                raise PrepareError(
                    f"pip could not download {name}; without network, set MILLION_LLAMA_CPP_SDIST to a copy of it"
                )
            os.replace(Path(tmp, name), path)
    found = sha256(path)
    if found != pin["sha256"]:
        raise PrepareError(f"{path}: sha256 is {found}, upstream.json needs {pin['sha256']}: remove it and try again")
    return path


def unpack(sdist: Path, dst: Path) -> None:
    with tarfile.open(sdist, "r:gz") as tar:
        for member in tar:
            inner = member.name.partition("/")[2]
            for prefix, folder in WANTED.items():
                if not inner.startswith(prefix) or not member.isfile():
                    continue
                relative = Path(folder, inner[len(prefix) :])
                if ".." in relative.parts or relative.is_absolute():
                    raise PrepareError(f"{sdist}: unsafe path {member.name}")
                if relative.parts[1:2] == (".git",):
                    continue  # upstream's git link would make git apply look for a repository
                target = dst / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with source, target.open("wb") as f:
                    shutil.copyfileobj(source, f)
                target.chmod(member.mode & 0o755 | 0o600)


def git(args: list[str], tree: Path) -> str:
    # With a ceiling, git does not take the checkout around the tree for the tree's own; there it would
    # apply nothing and still exit with 0.
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tree.resolve().parent))
    done = subprocess.run(["git", *args], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise PrepareError(f"git {' '.join(args)} failed in {tree}:\n{done.stderr}")
    return done.stdout


def apply_patches(tree: Path) -> list[str]:
    """Applies the series; returns the touched files, relative to the tree."""
    touched: set[str] = set()
    for patch in series():
        for line in git(["apply", "--numstat", str(patch)], tree).splitlines():
            touched.add(line.split("\t")[2])
        git(["apply", "--whitespace=nowarn", str(patch)], tree)
    return sorted(touched)


def sums_text(tree: Path, touched: list[str]) -> str:
    return "".join(f"{sha256(tree / name)}  {name}\n" for name in touched)


def prepare(out: Path, record: bool = False) -> Path:
    pin = json.loads((HERE / "upstream.json").read_text())
    tree = out / f"llama.cpp-{pin['version']}-{tree_digest(pin)}"
    if tree.is_dir() and not record:
        return tree
    sdist = fetch(pin, out)
    out.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix="tmp-", dir=out))
    try:
        unpack(sdist, tmp)
        sums = sums_text(tmp / "llama.cpp", apply_patches(tmp / "llama.cpp"))
        recorded = PATCHES / "SHA256SUMS"
        if record:
            recorded.write_text(sums)
        elif not recorded.is_file() or recorded.read_text() != sums:
            raise PrepareError(
                f"the patched files differ from {recorded}: run {Path(__file__).name} --record if the series changed"
            )
        tmp.chmod(0o755)
        if not tree.is_dir():
            os.replace(tmp, tree)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "build" / "upstream", help="folder for downloads and trees"
    )
    parser.add_argument("--record", action="store_true", help="rewrite patches/SHA256SUMS")
    args = parser.parse_args()
    try:
        print(prepare(args.out, args.record))
    except PrepareError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
