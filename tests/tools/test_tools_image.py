"""The image's archives: what is in a layer, that the same files give the same one, and that the Containerfile copies what we copy."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from tools import image

ROOT = Path(__file__).parents[2]


def names(layer: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        return set(tar.getnames())


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """(manifest, config, blobs) of an archive's one image."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    blobs = {"sha256:" + name.rpartition("/")[2]: content for name, content in files.items() if name.startswith("blobs/")}
    manifest = json.loads(blobs[json.loads(files["index.json"])["manifests"][0]["digest"]])
    return manifest, json.loads(blobs[manifest["config"]["digest"]]), blobs


def test_the_builder_sees_what_the_code_layer_holds() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert set(image.CODE) <= allowed
    assert allowed - set(image.CODE) == {"setup.cfg", "LICENSE", "requirements.lock", "requirements-image.lock", "tools/compile.py"}


def test_a_layer_of_the_same_files_is_the_same_layer(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "opt").mkdir(parents=True)
        (tmp_path / folder / "opt" / "file").write_text("content")
    layers = [image.tar_of(tmp_path / folder) for folder in ("one", "two")]
    assert layers[0] == layers[1] and names(layers[0]) == {"opt", "opt/file"}


def test_the_code_layer_holds_precompiled_code_and_nothing_else() -> None:
    found = names(image.code_layer())
    assert {"opt/pillion/proxy/app.py", "opt/pillion/bin/pillion", "opt/pillion/manifests/helm/Chart.yaml"} <= found
    assert any(name.startswith("opt/pillion/proxy/__pycache__/app.") for name in found)
    assert not [name for name in found if name.startswith(("opt/pillion/tests", "opt/pillion/bench", "opt/pillion/tools"))]


def test_compiled_modules_lie_beside_their_source_in_the_code_layer(tmp_path: Path) -> None:
    (tmp_path / "proxy" / "transport").mkdir(parents=True)
    for name in ("group__mypyc.so", "proxy/transport/relay.so", "proxy/transport/relay.py", "stamp"):
        (tmp_path / name).write_text("made")
    added = names(image.code_layer(compiled=tmp_path)) - names(image.code_layer())
    assert added == {"opt/pillion/group__mypyc.so", "opt/pillion/proxy/transport/relay.so"}


def test_a_layer_is_added_or_the_last_one_replaced(tmp_path: Path) -> None:
    first, second, third = (image.tar_of(_folder(tmp_path, name)) for name in ("first", "second", "third"))
    image.single_layer(tmp_path / "base.tar", "localhost/base:1", first, ["/bin/true"], User="7")
    layout = tmp_path / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "base.tar", "-C", layout], check=True)
    image.derive(tmp_path / "more.tar", "localhost/more:1", layout, second, {"Cmd": ["x"]})
    manifest, config, blobs = opened(tmp_path / "more.tar")
    assert [blobs[layer["digest"]] for layer in manifest["layers"]] == [first, second]
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert config["config"]["User"] == "7" and config["config"]["Cmd"] == ["x"]
    image.derive(tmp_path / "other.tar", "localhost/other:1", layout, third, {}, replace=True)
    manifest, config, blobs = opened(tmp_path / "other.tar")
    assert [blobs[layer["digest"]] for layer in manifest["layers"]] == [third]
    assert len(config["rootfs"]["diff_ids"]) == 1


def _folder(top: Path, name: str) -> Path:
    (top / name).mkdir()
    (top / name / "file").write_text(name)
    return top / name
