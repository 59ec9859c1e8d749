"""What a release cannot do to the worker that loads it: every file is checked, and none is code."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import (
    FILES,
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    QUERY_NAME,
    SCAN_VECTORS_NAME,
    SELF_TEST_NAME,
    STEP_NAME,
    STEP_VECTORS_NAME,
    Publication,
    read_manifest,
    sha256_of,
)
from afterclick.serving.releases import CURRENT_NAME, LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from tests.doubles import damaged
from tests.tiny_release import write_tiny_release

SETTINGS = ServingSettings(provider="cpu", threads=1, k=5, margin=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good release."""
    folder = tmp_path / "releases" / "r1"
    write_tiny_release(folder, num_items=20, units=4)
    return folder


def published(folder: Path) -> Publication:
    return Publication(number=1, release=folder.name, sha256=sha256_of(folder / MANIFEST_NAME))


def signed_again(folder: Path) -> Publication:
    """As one who may write the manifest too, so that every checksum fits."""
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes())
    manifest["files"] = {name: sha256_of(folder / name) for name in FILES}
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return published(folder)


def refused(folder: Path, publication: Publication) -> ContractError:
    with pytest.raises(ContractError) as caught:
        LoadedRelease(publication, folder, SETTINGS)
    return caught.value


@pytest.mark.parametrize("name", [MANIFEST_NAME, *FILES])
def test_one_byte_of_any_file_is_enough_to_refuse(folder: Path, name: str) -> None:
    """A release that was changed on its way was not trained by us."""
    publication = published(folder)
    assert LoadedRelease(publication, folder, SETTINGS).publication is publication
    data = bytearray((folder / name).read_bytes())
    # Of JSON a digit, so that it stays JSON: the checksum must notice, not the parser.
    at = next(n for n in reversed(range(len(data))) if chr(data[n]).isdigit())
    data[at] ^= 1
    (folder / name).write_bytes(data)

    error = refused(folder, publication)

    assert error.reason == "checksum"
    assert name in str(error)


@pytest.mark.parametrize("name", [MANIFEST_NAME, *FILES])
def test_a_link_is_judged_by_what_it_leads_to(folder: Path, name: str, tmp_path: Path) -> None:
    """The checksum is of the bytes that will be read, wherever they lie."""
    publication = published(folder)
    other = tmp_path / "other"
    (folder / name).rename(other)
    (folder / name).symlink_to(other)
    LoadedRelease(publication, folder, SETTINGS)

    other.write_bytes(damaged(other.read_bytes()))

    assert refused(folder, publication).reason in ("checksum", "manifest")


class Opens:
    """Unpickled, it writes a file: what pickled data can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [STEP_VECTORS_NAME, SCAN_VECTORS_NAME, SELF_TEST_NAME])
def test_pickled_arrays_are_refused_unread(folder: Path, name: str, tmp_path: Path) -> None:
    """Even from one who may sign: data must never become code."""
    payload = np.array([Opens(tmp_path / "ran")], dtype=object)
    if name == SELF_TEST_NAME:
        np.savez(folder / name, state=payload)
    else:
        np.save(folder / name, payload)
    publication = signed_again(folder)

    error = refused(folder, publication)

    assert error.reason in ("items", "self-test")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [STEP_NAME, QUERY_NAME])
@pytest.mark.parametrize("location", ["weights.bin", "../../outside.bin", "/etc/hostname"])
@pytest.mark.parametrize("hidden", [False, True], ids=["weights", "inside-a-node"])
def test_a_graph_with_weights_in_another_file_is_refused(
    folder: Path, name: str, location: str, hidden: bool
) -> None:
    """Such a file has no checksum, and its path may lead anywhere."""
    (folder / "weights.bin").write_bytes(bytes(64))
    (folder.parent.parent / "outside.bin").write_bytes(bytes(64))
    graph = onnx.load(folder / name)
    tensor = onnx.TensorProto(
        name="more", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    if hidden:
        graph.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value=tensor))
    else:
        graph.graph.initializer.append(tensor)
    (folder / name).write_bytes(graph.SerializeToString())
    publication = signed_again(folder)

    error = refused(folder, publication)

    assert error.reason == "graph"
    assert "another file" in str(error)


@pytest.mark.parametrize("files", [["../evil"], [*FILES, "../../evil"], [*FILES, "more.bin"]])
def test_a_manifest_names_our_files_and_no_others(folder: Path, files: list[str]) -> None:
    """What it names is opened."""
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes())
    manifest["files"] = dict.fromkeys(files, hashlib.sha256().hexdigest())
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))

    assert refused(folder, published(folder)).reason == "manifest"


def test_an_oversized_manifest_is_not_read(folder: Path) -> None:
    """A file of gigabytes must not fill the worker's memory."""
    with (folder / MANIFEST_NAME).open("ab") as file:
        file.truncate(MANIFEST_BYTES_MAX * 1000)

    with pytest.raises(ContractError, match="more than 1048576 bytes"):
        read_manifest(folder)


def test_a_release_in_a_folder_of_another_name_is_refused(folder: Path) -> None:
    """Heads and lists name the release; the name must lead back to it."""
    copy = folder.rename(folder.with_name("r2"))

    assert refused(copy, published(copy)).reason == "release-name"


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "", ".hidden", "/etc", "a/b", "a\\b", "x" * 97, "a\0b"]
)
def test_a_name_of_a_release_is_no_path(tmp_path: Path, name: str) -> None:
    """`current.json` and the command line may say anything; only folders at the root are opened."""
    write_tiny_release(tmp_path / "outside", num_items=20, units=4)
    root = tmp_path / "releases"
    root.mkdir()
    store = ReleaseStore(str(root))
    written = {"number": 1, "release": name, "sha256": "0"}
    (root / CURRENT_NAME).write_bytes(msgspec.json.encode(written))

    for call in (store.current, lambda: store.fetch(name), lambda: store.publish(name)):
        with pytest.raises(ContractError) as caught:
            call()
        assert caught.value.reason in ("publication", "release-name")


def test_a_place_s_password_is_not_shown() -> None:
    """fsspec takes `ftp://user:password@host/…`; messages name the place."""
    url = "memory://me:hunter2@bucket/releases"
    store = ReleaseStore(url)

    with pytest.raises(ContractError) as caught:
        store.fetch("r1")

    assert "bucket/releases" in str(caught.value)
    assert "hunter2" not in str(caught.value) + repr(ServingSettings(releases=url))
