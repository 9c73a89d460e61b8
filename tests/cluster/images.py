"""The images that a test cluster needs, as archives: made only when what is in them changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import kit
from tests.cluster.nodes import PAUSE_IMAGE
from tools import image

COREDNS_IMAGE = "localhost/coredns:1"
APP_IMAGE = "localhost/pillion-app:1"
ETCD_IMAGE = "localhost/etcd:1"
CERT_MANAGER_IMAGE = f"localhost/cert-manager:v{kit.CERT_MANAGER}"
APP = Path(__file__).parent / "app"


def pillion(*, agent: bool = True) -> list[Path]:
    """Pillion's image with the code as it is, and the agent's; libraries are built only when the lock file or the Containerfile changed.

    With compiled modules, as users' images have them; plain Python where there is no compiler.
    """
    recipe = hashlib.sha256()
    for name in ("Containerfile", "requirements-image.lock", "tools/image.py"):
        recipe.update((image.ROOT / name).read_bytes())
    made = []
    for of_agent in (False, True) if agent else (False,):
        stamp = image.CACHE / ("recipe-agent" if of_agent else "recipe")
        with image.alone():
            if not stamp.exists() or stamp.read_text() != recipe.hexdigest() or not image.layout(of_agent).exists():
                image.build(agent=of_agent, hot="interpreted")
                stamp.write_text(recipe.hexdigest())
            image.code(agent=of_agent, hot="compiled")
        made.append(image.archive(of_agent))
    return made


def pause() -> Path:
    """What holds a pod's namespaces: needed before the first pod starts."""
    return _single(PAUSE_IMAGE, {kit.have("pause") / "pause": "pause"}, ["/pause"])


def coredns() -> Path:
    return _single(COREDNS_IMAGE, {kit.have("coredns") / "coredns": "coredns"}, ["/coredns"])


def app() -> Path:
    """The tests' app on Pillion's own layers, which the nodes have already; without the sidecar's code it is only a Python."""
    path = image.CACHE / "app.tar"
    with image.alone(), tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "app").mkdir()
        for program in APP.glob("*.py"):
            (Path(scratch) / "app" / program.name).write_bytes(program.read_bytes())
        settings = {"Entrypoint": ["python3", "/app/app.py"], "Cmd": ["serve"], "User": "1000:1000"}
        image.derive(path, APP_IMAGE, image.layout(False), image.tar_of(Path(scratch)), settings)
    return path


def etcd() -> Path:
    """This machine's etcd with the libraries that it is linked to; nothing else, not even a shell."""
    program = shutil.which("etcd") or "/usr/bin/etcd"
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout  # fails for a static one
    files = [Path(word) for line in linked.splitlines() for word in line.split() if word.startswith("/")]
    return _single(ETCD_IMAGE, {Path(program): "usr/bin/etcd", **{file: str(file).lstrip("/") for file in files}}, ["/usr/bin/etcd"])


def cert_manager() -> Path:
    """All three of its components; the environment variable ROLE says which."""
    return _single(CERT_MANAGER_IMAGE, {kit.have("cert-manager") / "cert-manager": "cert-manager"}, ["/cert-manager"])


def conformance() -> list[Path]:
    """The echo images of the Gateway API's suite, under the names that its manifests say."""
    programs = kit.have("echo")
    suite = kit.have("gateway") / "suite"
    names = sorted({name for file in (suite / "mesh").glob("*.y*ml") for name in _images(file)})
    return [
        _single(
            name,
            {programs / "client": "usr/local/bin/client", programs / "server": "usr/local/bin/server"},
            ["/usr/local/bin/server"],
            certificate=True,
        )
        for name in names
    ]


def _images(manifests: Path) -> list[str]:
    """Every ``image:`` in a file of manifests."""

    def walk(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["image"]] if isinstance(value.get("image"), str) else []
            return own + [name for each in value.values() for name in walk(each)]
        return [name for each in value for name in walk(each)] if isinstance(value, list) else []

    return [name for document in yaml.safe_load_all(manifests.read_text()) for name in walk(document)]


def _single(name: str, files: dict[Path, str], entrypoint: list[str], *, certificate: bool = False) -> Path:
    """An image of a few files; the echo application also wants a certificate and a folder for temporary files."""
    recipe = repr([name, entrypoint, certificate, [(str(source), source.stat().st_size, target) for source, target in files.items()]])
    path = image.CACHE / f"{name.rpartition('/')[2].replace(':', '-')}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.tar"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as scratch:
        for source, target in files.items():
            place = Path(scratch) / target
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
            place.chmod(0o755)
        if certificate:
            (Path(scratch) / "tmp").mkdir(mode=0o1777)
            (Path(scratch) / "tmp").chmod(0o1777)
            from tests.cluster import pki

            pki.self_signed(Path(scratch) / "cert.crt", Path(scratch) / "cert.key")
        Path(scratch).chmod(0o755)
        image.single_layer(path, name, image.tar_of(Path(scratch)), entrypoint)
    return path
