"""Find, verify, load and warm a release; publish one. Knows no Redis and no Kafka.

A release is looked for in a folder, or under an fsspec URL (s3://…, gs://…) from where it is pulled
into a
local cache. Nothing is served before its checksums fit and its self-test gives the recorded
numbers.
"""

import contextlib
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from afterclick.serving.blend import Blend
from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context
from afterclick.serving.engine import F32, Engine, Past, output_of
from afterclick.serving.errors import BAD_JSON, ConfigError, ContractError, UnavailableError
from afterclick.serving.index import TwoStageScanner
from afterclick.serving.manifest import (
    MANIFEST_NAME,
    SELF_TEST_NAME,
    Manifest,
    Publication,
    ReleaseName,
    read_manifest,
    sha256_of,
    verify_files,
)
from afterclick.serving.memory import Memory
from afterclick.serving.past import past_of
from afterclick.serving.place import Place
from afterclick.serving.ranking import pick_plain
from afterclick.serving.scanner import Scanner
from afterclick.serving.settings import ServingSettings

CURRENT_NAME = "current.json"
SELF_TEST_TOLERANCE = 1e-4
"""Largest absolute difference to recorded outputs, which may come from another CPU level or a GPU:
float32
sums of some hundred terms near 1 differ by about 1e-6; a wrong weight differs by much more.
"""

log = logging.getLogger(__name__)


class LoadedRelease:
    """A release that is ready: graphs, scan and catalogue, under a publication's number."""

    def __init__(self, publication: Publication, folder: Path, settings: ServingSettings) -> None:
        self.publication = publication
        self.manifest = load_checked(folder, publication)
        self.engine = Engine(
            folder, self.manifest, provider=settings.provider, threads=settings.threads
        )
        self.blend: Blend | None = None
        """None: lists are the model's own ranking."""
        self.memory: Memory | None = None
        if self.manifest.blend is not None:
            self.blend = Blend(folder, self.manifest, threads=settings.threads)
        if settings.head not in self.manifest.heads:
            raise ContractError(
                f"release {folder.name}: it has heads {list(self.manifest.heads)}, the setting "
                f"asks for {settings.head!r}; train with purchase_weight, or set head to 'click'",
                reason="head",
            )
        self_test(folder, self.engine, self.blend)
        self.catalog = Catalog.from_release(folder, self.manifest)
        if self.blend is not None:
            self.memory = Memory.from_release(folder, self.manifest, self.catalog.ids)
        self.scanner = _scanner(self.catalog.scan_vectors_ND, settings)
        self.catalog.changed_rows.clear()
        self._warm(settings)

    def refresh(self) -> None:
        """Show the scan what the catalogue took since."""
        if self.catalog.changed_rows:
            self.scanner.changed(self.catalog.scan_vectors_ND, self.catalog.changed_rows)
            self.catalog.changed_rows.clear()

    def _warm(self, settings: ServingSettings) -> None:
        # Memory arenas grow on first use; without this the first click after a swap pays for it.
        want = settings.k + settings.margin + 1
        for num_users in (1, 32, 256):
            state_BS = self.engine.zero_state(num_users)
            x_TBE = np.zeros((1, num_users, self.manifest.step_dim), np.float32)
            codes_TB = np.zeros((1, num_users), np.int64)
            lens_B = np.ones(num_users, np.int32)
            state_BS = self.engine.advance(
                state_BS, x_TBE, lens_B, event_TB=codes_TB, gap_TB=codes_TB, hour_TB=codes_TB
            )
            past = past_of([b""] * num_users, self.catalog, self.manifest.inputs.past)
            query_BD = self.engine.query(state_BS, past)
            pick_plain(*self.scanner.top(query_BD, want), self.catalog.texts, want=want - 1)
            if num_users == 1:
                self.scanner.scores(query_BD)
            if self.blend is not None and self.memory is not None:
                contexts = [Context()] * num_users
                self.blend.rank(
                    query_BD, contexts, self.memory, self.catalog, self.scanner, want=want
                )


class ReleaseStore:
    """The place where releases are published.

    Args:
        root: a folder, or an fsspec URL.
        cache: local folder that a URL's releases are pulled into.
    """

    def __init__(self, root: str, cache: str = ".cache/releases") -> None:
        self._place = Place(root)
        self.root = self._place.root
        """As messages show it."""
        self.is_remote = self._place.is_remote
        self._cache = Path(cache)
        self._local = self._place.folder

    def current(self) -> Publication | None:
        """What is published now, None before the first publication.

        Raises:
            ContractError: `current.json` is not a publication.
            UnavailableError: the place does not answer.
        """
        data = self._place.read(CURRENT_NAME)
        if data is None:
            return None
        try:
            return msgspec.json.decode(data, type=Publication)
        except BAD_JSON as error:
            raise ContractError(
                f"{self.root}/{CURRENT_NAME}: {error}", reason="publication"
            ) from error

    def staging(self, release: str) -> Path:
        """A fresh local folder, named by the release, to write its files into; `add` takes it from
        there.
        """
        parent = self._cache if self.is_remote else self._local
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent)) / release
        folder.mkdir()
        return folder

    def add(self, folder: Path) -> None:
        """Move a complete staged release to its place, whole.

        Raises:
            ContractError: it is not complete, or a release of that name is already there.
        """
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        if folder.name in self.list():
            raise ContractError(
                f"release {folder.name}: {self.root} holds one of this name already",
                reason="release-name",
            )
        if self.is_remote:
            # The manifest goes last: a folder without one is no release.
            remote = self._place.remote
            remote.makedirs(self._place.path(folder.name), exist_ok=True)
            for name in (*manifest.files, MANIFEST_NAME):
                remote.put_file(str(folder / name), self._place.path(f"{folder.name}/{name}"))
            shutil.rmtree(folder.parent)
            return
        folder.rename(self._local / folder.name)
        folder.parent.rmdir()

    def publish(self, release: str) -> Publication:
        """Make a release the one to serve, under the next number; an earlier release is a rollback.

        Raises:
            ContractError: there is no such release, or its bytes do not fit its manifest.
        """
        folder = self.fetch(release)
        verify_files(folder, read_manifest(folder))
        with self.publishing():
            before = self.current()
            publication = Publication(
                number=before.number + 1 if before else 1,
                release=release,
                sha256=sha256_of(folder / MANIFEST_NAME),
            )
            self._place.replace(CURRENT_NAME, msgspec.json.encode(publication))
        return publication

    def publishing(self) -> contextlib.AbstractContextManager[bool]:
        """What is published stays so meanwhile, where the place has locks."""
        return self._place.lock(".publish.lock")

    def fetch(self, release: str) -> Path:
        """Local folder of a release; from a URL it is pulled once.

        Raises:
            ContractError: there is none of that name, or it is no name.
        """
        try:
            msgspec.convert(release, ReleaseName)
        except msgspec.ValidationError as error:
            raise ContractError(
                f"{self.root}: {release[:96]!r} is no name of a release: {error}",
                reason="release-name",
            ) from error
        folder = (self._cache if self.is_remote else self._local) / release
        if (folder / MANIFEST_NAME).is_file():
            return folder
        if not self.is_remote or release not in self.list():
            raise ContractError(f"{self.root}: no release {release!r}", reason="torn")
        pulled = self.staging(release)
        try:
            self._pull(release, MANIFEST_NAME, pulled)
            for name in read_manifest(pulled).files:
                self._pull(release, name, pulled)
        except ContractError:
            shutil.rmtree(pulled.parent, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(pulled.parent, ignore_errors=True)
            raise UnavailableError(f"release {release} at {self.root}: {error!r}") from error
        with contextlib.suppress(OSError):  # somebody else on this machine pulled it meanwhile
            pulled.rename(folder)
        shutil.rmtree(pulled.parent, ignore_errors=True)
        return folder

    def _pull(self, release: str, name: str, folder: Path) -> None:
        self._place.remote.get_file(self._place.path(f"{release}/{name}"), str(folder / name))

    def list(self) -> list[str]:
        """Names of the releases that are there, sorted."""
        return [name.partition("/")[0] for name in self._place.names(f"*/{MANIFEST_NAME}")]

    def remove(self, release: str) -> None:
        """Delete a release; a copy that this machine pulled stays."""
        self._place.remove_folder(release, first=MANIFEST_NAME)


def _scanner(scan_vectors_ND: F32, settings: ServingSettings) -> Scanner:
    if settings.scan == "exact":
        return Scanner(
            scan_vectors_ND,
            provider=settings.provider,
            threads=settings.threads,
            precision=settings.precision,
        )
    if settings.provider == "cuda" or settings.precision != "fp32":
        raise ConfigError(
            "scan: 'two-stage' runs on the CPU with precision 'fp32', got provider "
            f"{settings.provider!r} and precision {settings.precision!r}; set scan to 'exact'"
        )
    return TwoStageScanner(scan_vectors_ND, threads=settings.threads)


def load_checked(folder: Path, publication: Publication) -> Manifest:
    """Manifest of a release whose every checksum fits.

    Raises:
        ContractError: torn, tampered with, or not the release that was published.
    """
    manifest = read_manifest(folder)
    found = sha256_of(folder / MANIFEST_NAME)
    if found != publication.sha256:
        raise ContractError(
            f"release {folder.name}: sha256 of {MANIFEST_NAME} is {found[:12]}…, "
            f"publication {publication.number} says {publication.sha256[:12]}…",
            reason="checksum",
        )
    verify_files(folder, manifest)
    return manifest


def self_test(folder: Path, engine: Engine, blend: Blend | None = None) -> None:
    """Run a release's recorded inputs and compare; a release with a blend has some for it, too.

    Raises:
        ContractError: the recording cannot be read, or an output is further than
            `SELF_TEST_TOLERANCE` from the recorded one.
    """
    where = f"release {folder.name}: self-test"
    try:
        with np.load(folder / SELF_TEST_NAME, allow_pickle=False) as recorded:
            data = {name: recorded[name] for name in recorded.files}
        for name, array in replayed(data, engine, blend).items():
            worst = float(np.abs(array - data[name]).max())
            if not worst <= SELF_TEST_TOLERANCE:
                raise ContractError(
                    f"{where}: {name} is {worst:.2e} from its recording, "
                    f"at most {SELF_TEST_TOLERANCE:.0e} is allowed",
                    reason="self-test",
                )
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile, AssertionError) as error:
        raise ContractError(f"{where}: cannot run: {error!r}", reason="self-test") from error


def replayed(data: Mapping[str, Any], engine: Engine, blend: Blend | None = None) -> dict[str, F32]:
    """What a self-test compares: outputs by name, for its recorded inputs."""
    state_BS = engine.run_steps(  # a rounding may fall to the other side on another CPU
        data["state"],
        data["x"],
        data["lens"],
        event_TB=data.get("event"),
        gap_TB=data.get("gap"),
        hour_TB=data.get("hour"),
    )
    past = Past(data["past"], data["has_past"]) if engine.manifest.inputs.past else None
    found = {"state_next": state_BS}
    for head in engine.manifest.heads:
        found[output_of(head)] = engine.query(state_BS, past, head=head)
    if blend is not None:
        found["blend_score"] = blend.scores(data["blend_features"])
    return found
