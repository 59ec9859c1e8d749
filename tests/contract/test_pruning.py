"""`afterclick releases prune` on a real Redis: a replay's releases stay."""

from pathlib import Path

import pytest

from afterclick.serving.cli import main
from afterclick.serving.keys import Keys
from afterclick.serving.records import Head, InputsEntry
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import Store
from afterclick.streams.archive import Archive
from afterclick.streams.local import local_redis
from tests.tiny_release import write_tiny_release

pytestmark = pytest.mark.service


def entry(release: str) -> InputsEntry:
    return InputsEntry(
        offset=0,
        publication=1,
        release=release,
        sha256="",
        publication_items=[],
        items=[],
        rules=ListRules.of(ServingSettings()),
    )


def test_what_is_published_new_or_named_by_any_inputs_list_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release that a replay needs and that is gone cannot be trained again to the same bytes."""
    folder = tmp_path / "releases"
    for name in "abcdefghi":
        write_tiny_release(folder / name, num_items=30)
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(folder))
    main(["releases", "publish", "a"])
    with local_redis(tmp_path / "redis") as server:  # of its own: prune looks at all namespaces
        monkeypatch.setenv("AFTERCLICK_SERVING__REDIS", server.url)
        assert main(["releases", "prune", "--keep", "2"]) == 2
        assert "no inputs list names a release" in capsys.readouterr().err
        for namespace, partition, name in (("afterclick", 0, "b"), ("tenant", 3, "c")):
            store = Store(server.url, Keys(namespace), record_ttl_s=99, popularity_ttl_s=99)
            assert store.commit(partition, b"", Head(batch="1"), entry(name), [], []) is None
            store.close()
        archive = Archive(str(tmp_path / "archive"))
        archive.keep_inputs("afterclick", 0, [entry("d")])
        archive.keep_inputs("afterclick", 0, [entry("e")])  # a new start: d's copy stands aside
        archive.keep_inputs("afterclick/e1", 0, [entry("f")])
        prune = ["releases", "prune", "--keep", "2", "--archive", archive.place.root]

        assert main([*prune, "--dry-run"]) == 0
        assert capsys.readouterr().out == "would delete g\n"
        assert (folder / "g").is_dir()
        assert main(prune) == 0
        assert capsys.readouterr().out == "deleted g\n"
        assert main(["releases", "list"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == list("abcdefhi")
    assert not list(folder.glob(".removed*"))
