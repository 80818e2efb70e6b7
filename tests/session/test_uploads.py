"""Checkpoints are copied elsewhere by a command or to a store, and whatever happens to that, training goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from distro_optim.errors import ConfigurationError, MissingDependencyError
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.monitor.metrics import metrics_of
from distro_optim.strategy.network.upload_carriers import (
    Carrier,
    CommandCarrier,
    StoreCarrier,
    UploadFailed,
    carrier_of,
)
from distro_optim.strategy.network.upload_queue import MAX_WAITING, UploadCounts, UploadQueue
from distro_optim.strategy.network.uploads import Uploads
from distro_optim.strategy.upload import Saved, Upload, filled_in, read_upload

from .scripts import Script
from .test_checkpoints import Peer
from .world import SessionWorld

pytestmark = pytest.mark.waiting


def saved(path: Path | str = "/runs/step-00000120", step: int = 120, run: str = "friends") -> Saved:
    return Saved(path=Path(path), step=step, run_id=run)


# -- what was asked for ------------------------------------------------------------------------------------------------


def test_a_command_gets_the_checkpoint_in_its_arguments() -> None:
    upload = Upload("rclone copy {path} 'remote:my bucket/{run}/{name}' --immutable --tag=${step}")
    assert filled_in(upload.command, saved()) == [
        "rclone",
        "copy",
        "/runs/step-00000120",
        "remote:my bucket/friends/step-00000120",
        "--immutable",
        "--tag=${step}",
    ]


@pytest.mark.parametrize("name", ["-oProxyCommand=reboot", "../../etc", "a b;$(reboot)", "", "\x1b[2J"])
def test_a_run_named_by_a_stranger_is_no_option_and_no_other_folder(name: str) -> None:
    for word in filled_in(["{run}", "{name}"], saved(f"/runs/{name.replace('/', '~')}-step9", run=name)):
        assert word[0] not in "-."
        assert not set(word) & set("/; $()\x1b")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "empty"),
        ("rclone copy remote:bucket", "write {path}"),
        ("cp {path} {place}", "there is no {place}"),
        ("cp '{path} /backup", "not a command"),
        ("bash -c 'cp -r {path} /backup'", 'cp -r "$1" /backup'),
        (7, "a URL such as"),
    ],
)
def test_what_cannot_be_uploaded_with_is_told_before_anything_begins(given: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_upload(given)
    assert says in str(caught.value)


@pytest.mark.parametrize("limits", [{"timeout_seconds": 0}, {"tries": 0}, {"wait_seconds": -1}])
def test_limits_of_an_upload_are_looked_at(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(limits))):
        Upload("cp {path} /backup", **limits)


def test_a_command_that_is_not_installed_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="no command 'no-such-program'"):
        carrier_of(Upload("no-such-program {path}"))


def test_the_package_of_a_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # also where it is installed
    with pytest.raises(MissingDependencyError, match="pip install s3fs"):
        carrier_of(Upload("s3://bucket/run"))


def test_a_store_that_nobody_knows_is_told() -> None:
    with pytest.raises(ConfigurationError, match="nonsense"):
        carrier_of(Upload("nonsense://bucket/run"))


# -- what is next ------------------------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_with_growing_waits_and_told_once() -> None:
    queue = UploadQueue(tries=3)
    queue.submit(saved())
    now, waits = 0.0, []
    for _ in range(3):
        found, _ = queue.next(now)
        assert found == saved()
        queue.failed("no route", now, 0.0)
        _, wait = queue.next(now)
        waits.append(wait)
        now += wait or 0.0
    assert waits == [5.0, 15.0, None]
    assert queue.counts == UploadCounts(failed=1)
    assert len([text for text in queue.take_news() if "no route" in text]) == 1

    queue.submit(saved(step=130))
    for _ in range(3):
        _, wait = queue.next(now)
        now += wait or 0.0
        queue.next(now)
        queue.failed("no route", now, 0.0)
    assert queue.take_news() == []
    queue.submit(saved("/runs/step-00000140"))
    queue.next(now)
    queue.succeeded()
    assert queue.take_news() == ["step-00000140 is uploaded; 2 did not arrive before"]
    assert queue.counts == UploadCounts(done=1, failed=2)


def test_of_many_that_wait_the_oldest_are_left_out_but_not_the_one_under_way() -> None:
    queue = UploadQueue(tries=3)
    steps = [saved(f"/runs/step-{step:08}", step) for step in range(6)]
    queue.submit(steps[0])
    assert queue.next(0.0)[0] == steps[0]
    for later in steps[1:]:
        queue.submit(later)
    assert [step for step in steps if queue.holds(step.path)] == [steps[0], *steps[-MAX_WAITING:]]
    assert queue.counts == UploadCounts(left_out=3, waiting=3)
    assert len(queue.take_news()) == 1


# -- carrying ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Peer().save(CheckpointStore(tmp_path / "here"))


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_a_command_copies_a_checkpoint_that_can_be_resumed_from(checkpoint: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    carrier_of(Upload(["cp", "-r", "{path}", str(there)])).carry(saved(checkpoint))
    assert same_files(checkpoint, there / checkpoint.name)
    found = CheckpointStore(there).latest()
    assert found is not None
    assert found.step == 40


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_store_gets_the_file_that_says_it_is_whole_last(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    url = f"file://{tmp_path}/there" if kind == "file" else "memory://there"
    carrier = carrier_of(Upload(url + "/"))
    files = fsspec.filesystem(kind)
    order: list[str] = []
    put = files.put_file

    def put_file(path: str, place: str) -> None:
        order.append(place)
        put(path, place)

    monkeypatch.setattr(files, "put_file", put_file)
    carrier.carry(saved(checkpoint))
    assert order[-1].endswith("distro_optim.json")
    root = f"{tmp_path}/there" if kind == "file" else "/there"
    for path in checkpoint.iterdir():
        assert files.cat_file(f"{root}/{checkpoint.name}/{path.name}") == path.read_bytes()


def test_a_single_file_goes_into_the_folder(tmp_path: Path) -> None:
    state = tmp_path / "friends-step7.toml"
    state.write_text("step = 8")
    StoreCarrier(f"file://{tmp_path}/there", timeout_seconds=5).carry(saved(state))
    assert (tmp_path / "there" / state.name).read_text() == "step = 8"


def test_why_a_command_failed_is_its_last_line_made_printable(tmp_path: Path) -> None:
    script = "print('x' * 100_000); print('no \\x1b[31mspace left'); raise SystemExit(3)"
    carrier = CommandCarrier([sys.executable, "-c", script, "{path}"], timeout_seconds=60)
    with pytest.raises(UploadFailed, match=r"ended with status 3: no \?\[31mspace left"):
        carrier.carry(saved(tmp_path))


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    carrier = CommandCarrier([sys.executable, "-c", "import time; time.sleep(600)", "{path}"], timeout_seconds=0.05)
    with pytest.raises(UploadFailed, match=r"not done after 0\.05 s"):
        carrier.carry(saved(tmp_path))


# -- beside a training loop --------------------------------------------------------------------------------------------


class Slow(Carrier):
    """Carries when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Event()
        self.carried: list[int] = []
        self.cancelled = threading.Event()
        self.threads: set[threading.Thread] = set()

    @override
    def carry(self, saved: Saved) -> None:
        self.threads.add(threading.current_thread())
        self.began.set()
        assert self.gate.wait(30)
        if self.cancelled.is_set():
            raise UploadFailed("it was given up")
        self.carried.append(saved.step)

    @override
    def cancel(self) -> None:
        self.cancelled.set()
        self.gate.set()


@pytest.fixture
def slow() -> Iterator[Slow]:
    carrier = Slow()
    yield carrier
    carrier.gate.set()


def test_what_is_being_uploaded_stays_until_it_has_arrived(tmp_path: Path, slow: Slow) -> None:
    uploads = Uploads(Upload("memory://there"), slow)
    store, peer = CheckpointStore(tmp_path, keep=1, held=uploads.holds), Peer()
    for step in (10, 20):
        uploads.submit(peer.save(store, step), step=step, run_id="friends")
        assert slow.began.wait(30)
    assert [path.name for path in store.saved()] == ["step-00000010", "step-00000020"]
    slow.gate.set()
    news: list[str] = []
    uploads.close(news.append)
    assert slow.carried == [10, 20]
    assert slow.threads.isdisjoint({threading.current_thread()})
    peer.save(store, 30)
    assert [path.name for path in store.saved()] == ["step-00000030"]


def test_the_end_waits_for_uploads_as_long_as_it_may_and_says_what_is_lost(tmp_path: Path, slow: Slow) -> None:
    uploads = Uploads(Upload("memory://there", wait_seconds=0.05), slow)
    uploads.submit(tmp_path, step=10, run_id="friends")
    news: list[str] = []
    uploads.close(news.append)
    assert "waiting for the upload of" in news[0]
    assert f"not uploaded: {tmp_path}" in news[1]
    assert slow.cancelled.is_set()
    assert uploads.counts == UploadCounts(left_out=1)


def test_ctrl_c_ends_the_waiting_and_nothing_else(tmp_path: Path, slow: Slow) -> None:
    uploads = Uploads(Upload("memory://there"), slow)
    uploads.submit(tmp_path, step=10, run_id="friends")
    news: list[str] = []

    def interrupted(text: str) -> None:
        news.append(text)
        if text.startswith("waiting"):
            raise KeyboardInterrupt

    uploads.close(interrupted)
    assert "not uploaded" in news[1]


def test_a_session_uploads_what_it_saves(make_world: Any, tmp_path: Path) -> None:
    world: SessionWorld = make_world(total_steps=6, epoch_time=200, init_min_clients=1, min_clients=1)
    there = tmp_path / "there"
    script = Script(session_settings={"checkpoint_dir": tmp_path / "here", "upload": f"file://{there}"})
    world.run(world.port(1), script)
    world.until_all_ended()
    here = {path.name for path in (tmp_path / "here").glob("step-*")}
    assert here
    assert here == {path.name for path in there.iterdir()}
    assert script.session.uploads == UploadCounts(done=len(here))
    (metric,) = [m for m in metrics_of(script.session.figures()) if m.name == "distro_optim_uploads"]
    assert metric.values == {"done": len(here), "failed": 0, "left_out": 0, "waiting": 0}
    assert any(text.endswith("is uploaded") for text in script.news)


def test_uploads_without_checkpoints_are_a_mistake() -> None:
    from distro_optim.strategy.session import SwarmSession

    from .scripts import new_model, new_optimizer

    model = new_model()
    for settings in ({"upload": "memory://there"}, {"keep_every": 5}):
        with pytest.raises(ConfigurationError, match="give checkpoint_dir"):
            SwarmSession(model, new_optimizer(model, overlap=True), **settings)


# -- which checkpoints stay --------------------------------------------------------------------------------------------


def test_of_each_so_many_steps_the_first_checkpoint_stays_also_for_later_processes(tmp_path: Path) -> None:
    peer = Peer()
    for step in (8, 16, 24, 32, 40, 48, 56, 64, 72):
        peer.save(CheckpointStore(tmp_path, keep=2, keep_every=30), step)
    assert [int(path.name[5:]) for path in CheckpointStore(tmp_path).saved()] == [8, 32, 64, 72]
