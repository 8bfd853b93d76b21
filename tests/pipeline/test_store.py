import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from align_pipeline.pipeline import store as stores
from align_pipeline.pipeline.errors import AlignError, InputError, Locked
from align_pipeline.pipeline.stage import Resolved
from align_pipeline.pipeline.store import Store
from toy_stages import Toy, ToyReport

RECORD = {"kind": "model", "stage": "toy", "metrics": {}, "resources": {"seconds": 1.0}, "inputs": {}}


def resolved(digest: str, base: Resolved | None = None) -> Resolved:
    return Resolved(ref="file:x", digest=digest, base=base)


def test_the_key_names_what_decides_the_result():
    key = stores.key(Toy(), {"data": resolved("sha256:1")})
    assert key.startswith("toy-") and len(key) == len("toy-") + 12
    same = [Toy(rate=0.5), Toy(how={"logging_steps": 3}), Toy(data="file:elsewhere/rows.jsonl")]
    assert {stores.key(stage, {"data": resolved("sha256:1")}) for stage in same} == {key}
    others = [
        stores.key(Toy(rate=0.25), {"data": resolved("sha256:1")}),
        stores.key(Toy(), {"data": resolved("sha256:2")}),
        stores.key(Toy(), {"model": resolved("sha256:1")}),
        stores.key(Toy(), {"data": resolved("sha256:1", base=resolved("sha256:b"))}),
    ]
    assert len({key, *others}) == 5


def test_inputs_inside_a_configuration_enter_the_key_by_digest_and_the_rest_as_it_is():
    def key(digest: str = "sha256:2", how: dict = {}, **judge: object) -> str:  # noqa: B006
        stage = ToyReport(models={"a": "stage:a"}, judge={"model": "stage:b", **judge}, how=how)
        return stores.key(stage, {"models.a": resolved("sha256:1"), "judge.model": resolved(digest)})

    assert key() == key(model="file:elsewhere") == key(how={"logging_steps": 3}) == key(strictness=2)
    assert len({key(), key(strictness=3), key("sha256:3")}) == 3
    assert stores.configuration(ToyReport(models={"a": "stage:a"}, judge={"model": "stage:b"})) == {
        "scorer": None,
        "reward": None,
        "judge": {"reward": None, "strictness": 2},
    }


def test_a_raised_version_gives_another_key(monkeypatch: pytest.MonkeyPatch):
    before = stores.key(Toy(), {})
    monkeypatch.setattr(Toy, "version", 2)
    assert stores.key(Toy(), {}) != before


def made(store: Store, key: str, text: str) -> None:
    out = store.work_path(key) / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "w.txt").write_text(text)


def test_publishing_lists_and_digests_content_only(tmp_path: Path):
    digests = []
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        store.open()
        made(store, "toy-1", "weights")
        artifact = store.publish("toy-1", {**RECORD, "made": {"at": name}})
        digests.append(artifact.digest)
        assert artifact.record["files"]["model/w.txt"]["bytes"] == 7
        assert not store.work_path("toy-1").exists()
    assert digests[0] == digests[1]


def test_force_moves_the_old_artifact_aside_and_it_stays_reachable(tmp_path: Path):
    store = Store(tmp_path)
    store.open()
    made(store, "toy-1", "old")
    old = store.publish("toy-1", RECORD)
    made(store, "toy-1", "new")
    new = store.publish("toy-1", RECORD)
    assert (store.artifact_path("toy-1") / "model" / "w.txt").read_text() == "new"
    assert store.find(old.digest).key == "toy-1~1"
    assert store.find("toy-1").digest == new.digest
    with pytest.raises(InputError, match="names no artifact"):
        store.find("nothing-here")


def test_a_kill_between_the_two_renames_is_completed(tmp_path: Path):
    store = Store(tmp_path)
    store.open()
    made(store, "toy-1", "old")
    store.publish("toy-1", RECORD)
    made(store, "toy-1", "new")
    real_rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "out":
            raise KeyboardInterrupt
        return real_rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        store.publish("toy-1", RECORD)
    assert store.get("toy-1") is None
    assert store.publish("toy-1", RECORD).record["files"]["model/w.txt"]["bytes"] == 3


def test_a_damaged_artifact_is_refused_with_its_file(tmp_path: Path):
    store = Store(tmp_path)
    store.open()
    made(store, "toy-1", "weights")
    store.publish("toy-1", RECORD)
    file = store.artifact_path("toy-1") / "model" / "w.txt"
    file.write_text("cut")
    with pytest.raises(InputError, match="w.txt: has 3 bytes instead of 7; the artifact is damaged"):
        store.get("toy-1")
    file.unlink()
    with pytest.raises(InputError, match="w.txt: is missing"):
        store.get("toy-1")


def _hold(root: Path, seconds: float) -> None:
    with Store(root).lock("toy-1", wait=True, say=print):
        (root / "held").touch()
        time.sleep(seconds)


def test_a_lock_says_who_holds_it_and_dies_with_its_process(tmp_path: Path):
    store = Store(tmp_path)
    store.open()
    assert store.busy("toy-1") is None
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, 60))
    process.start()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        assert f"pid {process.pid} on" in (store.busy("toy-1") or "")
        with pytest.raises(Locked, match=f"pid {process.pid}"), store.lock("toy-1", wait=False, say=print):
            pass
    finally:
        process.kill()
        process.join()
    with store.lock("toy-1", wait=False, say=print):
        assert json.loads((tmp_path / "locks" / "toy-1").read_text())["pid"] == os.getpid()


def test_a_left_over_worker_keeps_the_work_directory_locked(tmp_path: Path):
    import fcntl

    store = Store(tmp_path)
    store.open()
    with store.worker_lock_path("toy-1").open("a+") as orphan:
        fcntl.flock(orphan.fileno(), fcntl.LOCK_SH)
        with pytest.raises(Locked), store.lock("toy-1", wait=False, say=print):
            pass
    with store.lock("toy-1", wait=False, say=print):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; tests/test_disk.py mounts a read-only one")
def test_a_store_that_cannot_be_written_is_one_clear_line(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(AlignError, match="cannot be written .* name another one with --store"):
        Store(tmp_path / "runs").open()


def test_a_store_below_a_file_is_one_clear_line(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(AlignError, match="runs"):
        Store(tmp_path / "runs").open()
