"""The image, built here: bases from a Debian mirror instead of a registry, then the Containerfile by buildah, then archives for a cluster.

    tools/image.py build [--hot compiled] [--agent]   the whole image by the Containerfile; libraries are cached until the lock file changes
    tools/image.py code [--hot compiled] [--agent]    only the newest code on the libraries of the last build: a second, more to compile
    tools/image.py paths                              where the archives lie

Everything lies in ~/.cache/pillion/images (PILLION_CACHE changes the folder). An archive is an OCI layout in a tar, for
`ctr images import`, `docker load`, `kind load image-archive` and `k3d image import`. Needs root and Debian's buildah and mmdebstrap.
"""

from __future__ import annotations

import argparse
import compileall
import configparser
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("PILLION_CACHE") or Path.home() / ".cache" / "pillion") / "images"
SUITE = "bookworm"
NAME = "localhost/pillion"
"""A name that no container runtime looks for in a registry."""

CODE = ("core", "proxy", "policy", "identity", "injector", "ebpf", "local", "cli", "manifests")
PREFIX = "opt/pillion"
_NO_COMPILER = 3  # an exit code of tools/compile.py

_UNNEEDED = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/zoneinfo/*")
BASES = {
    "run": ("python3", "ca-certificates", "nftables"),
    "build": ("python3", "python3-pip", "ca-certificates"),
    "compile": ("python3", "python3-pip", "python3-dev", "gcc", "libc6-dev", "ca-certificates"),
    "agent": ("python3", "ca-certificates", "nftables", "python3-bpfcc", "iproute2"),
}


class Failed(Exception):
    """A step could not be done; says which and what the program said."""


def version() -> str:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return setup["metadata"]["version"]


def image(agent: bool = False) -> str:
    return f"{NAME}{'-agent' if agent else ''}:{version()}"


def archive(agent: bool = False) -> Path:
    return CACHE / f"pillion{'-agent' if agent else ''}.tar"


def say(text: str) -> None:
    print(f"image: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(
            f"{' '.join(str(word) for word in command[:3])} failed with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Two builds at once would share scratch names; the second waits."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- bases ---------------------------------------------------------------------------------------------------------------------------


def base_tar(kind: str) -> Path:
    """A Debian root file system with the packages of this kind; made once for each list of packages."""
    recipe = json.dumps([SUITE, BASES[kind], _UNNEEDED])
    path = CACHE / f"base-{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.tar"
    if not path.exists():
        say(f"making base {kind}: {', '.join(BASES[kind])}")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "base.tar"
            excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNNEEDED]
            run("mmdebstrap", "--variant=minbase", "--quiet", f"--include={','.join(BASES[kind])}", *excludes, SUITE, made)
            made.rename(path)
    return path


def base_image(kind: str) -> str:
    """The base as an image that a Containerfile's FROM finds."""
    tar = base_tar(kind)
    name = f"localhost/{tar.stem}:1"
    if subprocess.run(["buildah", "inspect", "--type", "image", name], capture_output=True, check=False).returncode:
        container = run("buildah", "from", "scratch").strip()
        try:
            run("buildah", "add", "--quiet", container, tar, "/")
            run("buildah", "commit", "--quiet", container, name)
        finally:
            run("buildah", "rm", container)
    return name


# --- the image -----------------------------------------------------------------------------------------------------------------------


def build(*, agent: bool, hot: str) -> None:
    """The image by the Containerfile; its OCI layout stays in the cache for `code`."""
    target = "agent" if agent else "pillion"
    arguments = {"BASE": base_image("run"), "BUILD_BASE": base_image("compile" if hot == "compiled" else "build"), "HOT": hot}
    if agent:
        arguments["AGENT_BASE"] = base_image("agent")
    say(f"building {image(agent)} ({hot})")
    words = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    run("buildah", "build", "--isolation=chroot", "--network=host", "--pull-never", "--layers", *words, *_pip(),
        f"--target={target}", "-f", "Containerfile", "-t", image(agent), ".")  # fmt: skip
    made = layout(agent)
    shutil.rmtree(made, ignore_errors=True)
    run("buildah", "push", "--quiet", image(agent), f"oci:{made}:latest")
    write_archive(archive(agent), image(agent), *opened(made), {}, made)


def _pip() -> list[str]:
    """This machine's way to its package registry: pip's settings and the certificates it trusts, for the build's RUN steps only."""
    words = [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_") and name != "PIP_FIND_LINKS"]
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    words += [f"--volume={bundle}:{bundle}:ro"] if bundle.exists() else []
    return [*words, *(["--volume=/etc/pip.conf:/etc/pip.conf:ro"] if Path("/etc/pip.conf").exists() else [])]


def layout(agent: bool) -> Path:
    return CACHE / ("layout-agent" if agent else "layout")


def code(*, agent: bool, hot: str) -> None:
    """Write the archive: the last build's layers, the last of them (our code) replaced by the code as it is now."""
    made = layout(agent)
    if not made.exists():
        raise Failed(f"there is no earlier build of {image(agent)}: run `tools/image.py build{' --agent' if agent else ''}` first")
    derive(archive(agent), image(agent), made, code_layer(compiled=compiled_copy() if hot == "compiled" else None), {}, replace=True)


def compiled_copy() -> Path | None:
    """The copy with compiled modules that the tests of the data path use too, made now if it is not current; None without a compiler."""
    copy = ROOT / ".cache" / "compiled"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "compile.py"), str(copy)], capture_output=True, text=True, check=False)
    if done.returncode == _NO_COMPILER:
        say(done.stderr.strip())
        return None
    if done.returncode:
        raise Failed(f"tools/compile.py failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return copy


def derive(path: Path, name: str, made: Path, layer: bytes, settings: dict[str, Any], *, replace: bool = False) -> None:
    """An archive of the image whose layout is ``made`` with one more layer (or another last one), and ``settings`` over its own."""
    manifest, config = opened(made)
    digest = "sha256:" + hashlib.sha256(layer).hexdigest()
    kept = -1 if replace else len(manifest["layers"])
    described = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": len(layer)}
    manifest["layers"] = [*manifest["layers"][:kept], described]
    config["rootfs"]["diff_ids"] = [*config["rootfs"]["diff_ids"][:kept], digest]
    config["config"] = {**config["config"], **settings}
    write_archive(path, name, manifest, config, {digest: layer}, made)


def opened(made: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and config of the one image in an OCI layout."""
    index = json.loads((made / "index.json").read_text())
    manifest = json.loads(_blob(made, index["manifests"][0]["digest"]))
    return manifest, json.loads(_blob(made, manifest["config"]["digest"]))


def code_layer(root: Path = ROOT, *, compiled: Path | None = None) -> bytes:
    """The code below ``root`` as one layer, compiled ahead: the base must have this interpreter's version of Python.

    With the machine code of the ``compiled`` copy beside it, if given; a Python of another version would overlook that.
    """
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch) / PREFIX
        for name in CODE:
            if (root / name).exists():
                shutil.copytree(root / name, top / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("setup.cfg", "LICENSE"):
            shutil.copy(ROOT / name, top)
        (top / "bin").mkdir()
        (top / "bin" / "python").symlink_to("/usr/bin/python3")
        (top / "bin" / "pillion").write_text('#!/bin/sh\nexec python3 -m cli.main "$@"\n')
        (top / "bin" / "pillion").chmod(0o755)
        for library in compiled.rglob("*.so") if compiled else ():
            shutil.copy(library, top / library.relative_to(compiled))
        compileall.compile_dir(top, quiet=2, stripdir=scratch, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
        return tar_of(Path(scratch))


def tar_of(folder: Path) -> bytes:
    """A layer: the folder's content, owned by root, with fixed times so that the same files give the same digest."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name, filter=plain)
    return memory.getvalue()


def _blob(made: Path, digest: str) -> bytes:
    return (made / "blobs" / digest.replace(":", "/")).read_bytes()


def write_archive(
    path: Path, name: str, manifest: dict[str, Any], config: dict[str, Any], fresh: dict[str, bytes], made: Path | None = None
) -> None:
    """An OCI archive of one image; blobs that are not ``fresh`` come from the layout ``made``."""

    def add(tar: tarfile.TarFile, where: str, content: bytes) -> None:
        info = tarfile.TarInfo(where)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    def described(content: bytes, kind: str) -> dict[str, Any]:
        fresh["sha256:" + hashlib.sha256(content).hexdigest()] = content
        return {
            "mediaType": f"application/vnd.oci.image.{kind}.v1+json",
            "digest": "sha256:" + hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }

    manifest = {**manifest, "schemaVersion": 2, "config": described(json.dumps(config).encode(), "config")}
    entry = described(json.dumps(manifest).encode(), "manifest")
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        kept = [layer["digest"] for layer in manifest["layers"] if layer["digest"] not in fresh]
        for digest in kept:
            assert made is not None
            add(tar, "blobs/" + digest.replace(":", "/"), _blob(made, digest))
        for digest, content in fresh.items():
            add(tar, "blobs/" + digest.replace(":", "/"), content)
    part.rename(path)


def single_layer(path: Path, name: str, layer: bytes, entrypoint: Sequence[str], **settings: Any) -> None:
    """An image of one layer without a builder: for pause, CoreDNS and the tests' apps."""
    digest = "sha256:" + hashlib.sha256(layer).hexdigest()
    environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Env": environment, **settings},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
        "history": [{"created_by": "pillion"}],
    }
    layers = {"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": len(layer)}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_archive(path, name, {"mediaType": "application/vnd.oci.image.manifest.v1+json", **layers}, config, {digest: layer})


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "code", "paths"])
    parser.add_argument("--agent", action="store_true", help="the agent's image, with bcc")
    parser.add_argument(
        "--hot", choices=["compiled", "interpreted"], default="interpreted", help="the hottest modules as machine code or as Python"
    )
    chosen = parser.parse_args(arguments)
    try:
        with alone():
            if chosen.what == "build":
                build(agent=chosen.agent, hot=chosen.hot)
            elif chosen.what == "code":
                code(agent=chosen.agent, hot=chosen.hot)
    except Failed as failed:
        say(str(failed))
        return 1
    print(archive(chosen.agent), image(chosen.agent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
