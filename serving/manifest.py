"""The release contract: what a release folder holds and what its manifest promises.

The reader owns the contract, so it lives here and the trainer writes what this file defines. A
release
is a folder, written whole and then renamed:

    <release>/
      manifest.json      this file's `Manifest`
      step.onnx          advances states:   x, lens, [event], [gap], [hour], states -> states
      query.onnx         reads states out:  state tensors -> query_BD
      items.json         `ItemTable`, row i belongs to item i, sorted by item id
      step_vectors.npy   float32 (N, E): what the step graph is fed for a touched item
      scan_vectors.npy   float32 (N, D): score of item n for a user = query_D · scan_vectors[n]
      self_test.npz      recorded inputs and outputs that a loader runs again before it serves
      blend.onnx         optional: scores candidates, `features (R, F) -> score (R,)`
      memory.npz         optional, with the blend: the fast memory as of the snapshot
      item_encoder.npz   optional: vectors of new items from their text (serving/encoder.py)

Shape letters: T steps, B users, E step vector, D scan vector, H hidden units, Y layers, N items.
An output bias is a coordinate: the query graph appends a 1, the last scan coordinate is the bias.
Knows no ONNX Runtime, Redis or Kafka.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from afterclick.serving.errors import BAD_JSON, ContractError

SCHEMA = 1
"""Version of this contract; a worker refuses a release of another one."""

SCHEMA_FP16 = 2
"""The same with states rounded to float16: a worker that knows only 1 would fold to other bits."""

MANIFEST_NAME = "manifest.json"
STEP_NAME = "step.onnx"
QUERY_NAME = "query.onnx"
ITEMS_NAME = "items.json"
STEP_VECTORS_NAME = "step_vectors.npy"
SCAN_VECTORS_NAME = "scan_vectors.npy"
SELF_TEST_NAME = "self_test.npz"
BLEND_NAME = "blend.onnx"
MEMORY_NAME = "memory.npz"
FILES = (STEP_NAME, QUERY_NAME, ITEMS_NAME, STEP_VECTORS_NAME, SCAN_VECTORS_NAME, SELF_TEST_NAME)
"""Every release has these."""

ENCODER_NAME = "item_encoder.npz"
OPTIONAL_FILES = (BLEND_NAME, MEMORY_NAME, ENCODER_NAME)
"""Files that a release may have besides; a manifest that names any other is refused."""

EVENTS = ("other", "view", "click", "cart", "purchase")
"""Event names with a code of their own, by position; every other name is code 0. Append only, 32 at
most.
"""

GAP_BUCKETS = 32
"""Gap bucket = bit length of the whole seconds since the user's previous interaction, at most 31.
"""


MANIFEST_BYTES_MAX = 1 << 20
"""A manifest has some kilobytes; a larger file is none, and is not read."""

ReleaseName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,95}$")]
"""Names a folder, so it holds no path and does not begin with a dot."""


class StateTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One recurrent tensor, shape (Y, B, H) in the graphs and Y·H floats in a user record."""

    name: str
    """Input name in both graphs; the step graph's output is `<name>_next`."""
    layers: Annotated[int, Meta(ge=1, le=16)]
    units: Annotated[int, Meta(ge=1, le=4096)]


class StepInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs of `step.onnx` besides the state tensors.

    Always: `x` float32 (T, B, E), zero beyond a user's length; `lens` int32 (B,), each ≥ 1.
    """

    event: bool = False
    """Graph also takes `event` int64 (T, B): code from `EVENTS`."""
    gap: bool = False
    """Graph also takes `gap` int64 (T, B): gap bucket, 0 for a user's first interaction."""
    hour: bool = False
    """Graph also takes `hour` int64 (T, B): hour of the day, UTC."""
    past: Annotated[int, Meta(ge=0, le=64)] = 0
    """M: the query graph also takes `past` float32 (B, M, E), step vectors of the last M known
    items, newest first, and `has_past` float32 (B, M), 1 where there is one; 0 for neither.
    """


class BlendSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the blend's candidates are gathered and described; the trainer fits with the same."""

    features: list[str]
    """Columns of `blend.onnx`'s input, in order; names are those of serving/features.py."""
    model: Annotated[int, Meta(ge=0, le=1000)] = 60
    """Best items by the model's own score; more of them where a list would be too short."""
    neighbours: Annotated[int, Meta(ge=0, le=1000)] = 40
    """Best items of the session neighbours."""
    sessions: Annotated[int, Meta(ge=0, le=10_000)] = 256
    """Newest past sessions looked at for an item of the user's."""
    nearest: Annotated[int, Meta(ge=0, le=1000)] = 100
    """Session neighbours of a user."""
    followers: Annotated[int, Meta(ge=0, le=256)] = 48
    """Newest transitions out of the last item whose items are candidates."""
    own: Annotated[int, Meta(ge=0, le=32)] = 20
    """The user's own last items."""
    popular: bool = True
    """What is popular by any measure; else only who has no past that is known is offered it."""
    older: Annotated[int, Meta(ge=0, le=256)] = 0
    """Newest transitions out of the second and the third last item."""
    touched: Annotated[int, Meta(ge=0, le=256)] = 0
    """Items that anybody touched last."""
    newest: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Items published last, by what the catalogue says, touched or not."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of the log the release was trained on."""

    source: str
    """`kafka:<topic>` or a file name without its folder."""
    offsets: dict[str, int] = {}
    """Next offset per partition of the clicks topic; empty for files."""
    num_events: int = 0
    first_ms: int = 0
    last_ms: int = 0


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How `item_encoder.npz` makes vectors of a new item: arrays `bucket` int64 (K,), `vector`
    float32 (K, E) and `given` float32 (V, E).
    """

    text_version: int
    """Version of the text function, `serving.text.TEXT_VERSION`."""
    num_buckets: Annotated[int, Meta(ge=1)]
    """Features are hashed into so many; only those that training met have a vector."""
    given_dim: Annotated[int, Meta(ge=0)] = 0
    """V: entries of the vectors that items bring along; 0 reads none."""
    step_norm: Annotated[float, Meta(ge=0)] = 0.0
    """Scan vectors have length 1 and step vectors this length; 0 leaves both as they are."""
    bias: float = 0.0
    """Bias of an item that training never saw."""


class Compression(msgspec.Struct, frozen=True, kw_only=True):
    """How a release was made smaller; none of it matters to a worker."""

    method: Literal["int8", "prune", "distill"]
    of: ReleaseName
    """The release that it was made from, or learnt from."""
    detail: dict[str, str | int | float] = {}
    metrics: dict[str, dict[str, float]] = {}
    """`before` and `after`: rates as fractions, bytes, and microseconds of a step."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker must know to serve a release, and to refuse it."""

    schema: int
    release: ReleaseName
    created_at: str
    """UTC, ISO 8601."""
    cell: Literal["lstm", "gru"]
    num_items: Annotated[int, Meta(ge=1)]
    step_dim: Annotated[int, Meta(ge=1)]
    """E."""
    scan_dim: Annotated[int, Meta(ge=1)]
    """D."""
    state: list[StateTensor]
    state_dtype: Literal["fp32", "fp16"] = "fp32"
    """What every state is rounded to after each step, and what records hold of it."""
    inputs: StepInputs
    history: Annotated[int, Meta(ge=1)]
    """Longest history the model was trained on."""
    snapshot: Snapshot
    items_offset: list[int] = []
    """Next offset per partition of the items topic that this catalogue already holds; missing ones
    are 0.
    """
    signals_offset: Annotated[int, Meta(ge=0)] = 0
    """Where a worker starts to read the signals topic for this release's memory."""
    blend: BlendSpec | None = None
    """None: lists are ranked by the model alone, and the release has neither of `OPTIONAL_FILES`
    that go with a blend.
    """
    metrics: dict[str, dict[str, float]] = {}
    """Per method (`model`, `popularity`, `markov`, …): rates as fractions and `predictions`."""
    heads: tuple[str, ...] = ("click",)
    """What the query graph can be asked for: its outputs are `query`, for `click`, and
    `query_<head>` for every other one.
    """
    encoder: EncoderSpec | None = None
    """None: new items are given the mean vector of their categories."""
    compression: Compression | None = None
    """None: as it was trained."""
    files: dict[str, str]
    """sha256, hex, of each of `FILES`, and of the `OPTIONAL_FILES` that are there."""

    @property
    def state_floats(self) -> int:
        """Floats of state in one user record."""
        return sum(tensor.layers * tensor.units for tensor in self.state)

    @property
    def state_bytes(self) -> int:
        """Bytes of them."""
        return self.state_floats * (2 if self.state_dtype == "fp16" else 4)


class ItemRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item as the release knows it."""

    item_id: str
    title: str = ""
    categories: list[str] = []
    published_ms: int | None = None
    available: bool = True
    text: str = ""
    domain: str = ""
    vector: list[float] | None = None
    """These three are for the trainer; the rows of a release leave them out."""


class ItemTable(msgspec.Struct, frozen=True, kw_only=True):
    """`items.json`: rows sorted by item id (code points), as the vectors are."""

    items: list[ItemRow]


class Publication(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`current.json`: the release that workers must serve from now on."""

    number: Annotated[int, Meta(ge=1)]
    """Grows by one with every publication, a rollback too."""
    release: ReleaseName
    sha256: str
    """sha256 of the release's manifest.json."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a release's manifest; the files it names are not looked at.

    Raises:
        ContractError: missing, too large, not JSON, of another schema, of a release that is called
            otherwise, or naming other files than `FILES`, or a blend without its files.
    """
    path = folder / MANIFEST_NAME
    where = f"release {folder.name}"
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
        if len(data) > MANIFEST_BYTES_MAX:
            raise ContractError(
                f"{where}: {MANIFEST_NAME} has more than {MANIFEST_BYTES_MAX} bytes",
                reason="manifest",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except FileNotFoundError as error:
        raise ContractError(f"{where}: no {MANIFEST_NAME}", reason="torn") from error
    except BAD_JSON as error:
        raise ContractError(f"{where}: {MANIFEST_NAME}: {error}", reason="manifest") from error
    expected = schema_of(manifest.state_dtype)
    if manifest.schema != expected:
        raise ContractError(
            f"{where}: schema {manifest.schema}, this worker reads {expected} where states are "
            f"{manifest.state_dtype}",
            reason="schema",
        )
    if manifest.state_bytes % 4:
        raise ContractError(
            f"{where}: {manifest.state_floats} floats of state in {manifest.state_bytes} bytes, "
            "records hold whole words of 4; fp16 needs an even number of units",
            reason="manifest",
        )
    if manifest.release != folder.name:
        raise ContractError(
            f"{where}: its manifest calls it {manifest.release!r}", reason="release-name"
        )
    named, required = set(manifest.files), set(FILES)
    if manifest.blend is not None:
        required |= {BLEND_NAME, MEMORY_NAME}
    if manifest.encoder is not None:
        required.add(ENCODER_NAME)
    if not required <= named or named - {*FILES, *OPTIONAL_FILES}:
        raise ContractError(
            f"{where}: manifest names files {sorted(named)}, expected {sorted(required)} "
            f"and none but {', '.join(OPTIONAL_FILES)} besides",
            reason="manifest",
        )
    return manifest


def schema_of(state_dtype: Literal["fp32", "fp16"]) -> int:
    """The schema that a release whose states are kept so has."""
    return SCHEMA_FP16 if state_dtype == "fp16" else SCHEMA


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file's sha256 with the manifest.

    Raises:
        ContractError: a file is missing (`torn`) or has other bytes (`checksum`).
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ContractError(f"release {folder.name}: {name} is missing", reason="torn")
        found = sha256_of(path)
        if found != expected:
            raise ContractError(
                f"release {folder.name}: sha256 of {name} is {found[:12]}…, "
                f"manifest says {expected[:12]}…",
                reason="checksum",
            )


def event_code(event: str) -> int:
    """Code of an event name; 0 for one without a code of its own."""
    return _CODES.get(event, 0)


def gap_bucket(gap_ms: int) -> int:
    """Bucket of a gap in milliseconds; integer arithmetic only, so that every machine agrees."""
    return min((max(gap_ms, 0) // 1000).bit_length(), GAP_BUCKETS - 1)


_CODES = {name: code for code, name in enumerate(EVENTS)}
