"""Only what edgeglm made is ever written over, collected or removed on a device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from edgeglm.deploy.device import environment as environments
from edgeglm.deploy.device import objects
from edgeglm.deploy.device.layout import MARKER, Layout
from edgeglm.deploy.device.wire import Refused
from tests.deploy.helpers import content, reason


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_home_that_is_named_as_the_root_is_neither_written_nor_removed(
    device, bundle, deploy, options, cli
):
    pear = device("pear")
    (pear.home / "thesis.txt").write_text("years of work")
    assert "there is no edgeglm in" in cli("remove", "pear", "--root", pear.home, code=2)
    assert "there is no edgeglm in" in cli("remove", "pear", "--old", "--root", pear.home, code=2)
    assert "there is no edgeglm in" in cli("rollback", "pear", "--root", pear.home, code=2)
    words = reason(deploy(bundle(), options=msgspec.structs.replace(options, root=str(pear.home))))
    assert "holds what is not edgeglm's (thesis.txt); pass a new or an empty folder as --root" in words
    assert names(pear.home) == ["thesis.txt"]


def test_asking_a_device_that_has_nothing_makes_nothing_there(device, cli):
    pear = device("pear")
    for command in ("remove", "rollback", "logs"):
        assert "there is no edgeglm in" in cli(command, "pear", code=2)
    assert not pear.home.joinpath(".local").exists()


def test_a_root_is_told_from_the_users_home_on(device, bundle, deploy, options, cli):
    pear = device("pear")
    nobodys = msgspec.structs.replace(options, root="~no-such-user/edgeglm")
    assert "no user whose home ~no-such-user/edgeglm could be in; pass another" in reason(
        deploy(bundle(), options=nobodys)
    )
    assert deploy(bundle(), options=msgspec.structs.replace(options, root="disk/edgeglm")).exit_code == 0
    assert json.loads(cli("devices", "--json"))[0]["root"] == str(pear.home / "disk/edgeglm")
    cli("remove", "pear")
    assert not (pear.home / "disk/edgeglm").exists()


def test_what_else_lies_in_a_root_outlives_its_removal(device, bundle, deploy, cli):
    pear = device("pear")
    deploy(bundle())
    assert (pear.root / MARKER).is_file()
    (pear.root / "notes.txt").write_text("mine")
    (pear.root / "pictures").mkdir()
    assert "notes.txt, pictures" in cli("remove", "pear")
    assert names(pear.root) == ["notes.txt", "pictures"]


def test_a_root_that_is_a_link_is_emptied_and_forgotten(device, bundle, deploy, options, cli):
    pear = device("pear")
    disk = pear.home / "disk"
    disk.mkdir()
    (pear.home / "link").symlink_to(disk)
    assert deploy(bundle(), options=msgspec.structs.replace(options, root="link")).exit_code == 0
    assert "freed" in cli("remove", "pear")
    assert names(disk) == []
    assert json.loads(cli("devices", "--json")) == []


def test_taking_one_root_away_forgets_no_other(device, bundle, deploy, options, cli):
    pear = device("pear")
    path = bundle()
    for root in ("first", "second"):
        assert deploy(path, options=msgspec.structs.replace(options, root=root)).exit_code == 0
    cli("remove", "pear", "--root", "first")
    assert json.loads(cli("devices", "--json"))[0]["root"] == str(pear.home / "second")
    cli("remove", "pear")
    assert not (pear.home / "second").exists()


def test_a_root_that_was_made_before_roots_were_marked_is_known(device, bundle, deploy, cli):
    pear = device("pear")
    deploy(bundle("one"))
    (pear.root / MARKER).unlink()
    two = bundle("two")
    assert deploy(two).exit_code == 0
    assert pear.answers() == content(two)
    cli("remove", "pear")
    assert not pear.root.exists()


def test_a_new_disk_may_be_a_root(tmp_path):
    (tmp_path / "lost+found").mkdir()
    Layout(tmp_path).make()
    assert Layout(tmp_path).remove()[1] == ["lost+found"]


def test_a_bare_repository_is_no_root(tmp_path):
    for name in ("objects", "refs"):
        (tmp_path / name).mkdir()
    with pytest.raises(Refused, match="pass a new or an empty folder"):
        Layout(tmp_path).make()
    assert not Layout(tmp_path).is_ours()


def test_what_is_freed_is_counted_once_however_often_it_is_linked_to(tmp_path):
    layout = Layout(tmp_path / "root")
    layout.make()
    (layout.objects / "0").write_bytes(b"x" * 1000)
    (layout.slots / "a/bundle").mkdir(parents=True)
    (layout.slots / "a/bundle/tower").hardlink_to(layout.objects / "0")
    (layout.slots / "a/environment").symlink_to("../../environments/mine")
    (tmp_path / "elsewhere").write_bytes(b"y" * 5000)
    (layout.slots / "a/link").symlink_to(tmp_path / "elsewhere")
    assert layout.remove() == (1000, [])


def test_a_link_in_a_root_is_not_followed_by_its_removal(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    layout = Layout(tmp_path / "root")
    layout.make()
    layout.run.rmdir()
    layout.run.symlink_to(tmp_path / "elsewhere")
    layout.remove()
    assert (tmp_path / "elsewhere/kept").exists()
    assert not layout.root.exists()


def environment(layout: Layout, name: str) -> Path:
    folder = layout.environments / name
    folder.mkdir()
    (folder / "complete.json").write_text('{"objects": []}')
    return folder


@pytest.fixture
def serving(tmp_path: Path) -> Layout:
    """A root whose slot a serves, in an environment of its own; another environment is nobody's."""
    layout = Layout(tmp_path)
    layout.make()
    environment(layout, "mine")
    environment(layout, "nobodys")
    (layout.slots / "a").mkdir()
    (layout.slots / "a/environment").symlink_to("../../environments/mine")
    (layout.objects / ("0" * 64)).touch()
    layout.write_record("a", objects=[], environment="mine")
    layout.point("current", "a")
    return layout


def test_an_environment_that_no_slot_runs_in_goes(serving):
    assert objects.collect(serving)["removed"] == 2
    assert names(serving.environments) == ["mine"]
    assert names(serving.objects) == []


def test_an_installation_that_a_power_cut_ended_goes(serving):
    (serving.root / ".wheels-x1").mkdir()
    (serving.root / ".wheels-x1/a.whl").touch()
    objects.collect(serving)
    assert not list(serving.root.glob(".wheels-*"))


def test_an_environment_is_on_the_disk_before_it_is_said_to_be_complete(serving, monkeypatch):
    synced = []

    def look(folder: Path) -> None:
        synced.append((folder / "installed").exists() and not (folder / "complete.json").exists())

    def run(command: Sequence[str]) -> None:
        folder = serving.environments / "new"
        folder.mkdir(exist_ok=True)
        (folder / "installed").touch()

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "sync_all", look)
    environments.made(serving, "new", {"pip-1.whl": "0" * 64}, lambda _: None)
    assert synced == [True]
    assert environments.is_complete(serving, "new")


@pytest.mark.parametrize("way", [objects.collect, Layout.remove])
def test_a_part_of_an_environment_that_was_to_go_is_not_complete(way, serving, monkeypatch):
    def cut(folder: Path, **_: object) -> None:
        raise KeyboardInterrupt if folder.exists() else FileNotFoundError

    monkeypatch.setattr("shutil.rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        way(serving)
    assert not environments.is_complete(serving, "nobodys")


@pytest.mark.parametrize("text", ["{", "", "[]", '{"state": "ready"}'])
def test_a_damaged_record_costs_nothing_that_is_served(text, serving):
    (serving.slots / "a/slot.json").write_text(text)
    assert objects.collect(serving) == {"removed": 0, "bytes": 0}
    assert (serving.slots / "a/environment/complete.json").exists()


def test_an_environment_is_kept_by_its_link_whatever_the_record_says(serving):
    serving.write_record("a", environment="another")
    objects.collect(serving)
    assert (serving.slots / "a/environment/complete.json").exists()


def test_a_device_with_a_damaged_record_is_mended_by_a_deploy(device, bundle, deploy, cli):
    pear = device("pear")
    deploy(bundle("one"))
    (pear.root / "slots/a/slot.json").write_text("{")
    assert "the record of slot a is damaged" in cli("remove", "pear", "--old", code=2)
    two, three = bundle("two"), bundle("three")
    for path in (two, three):
        assert deploy(path).exit_code == 0
        assert pear.answers() == content(path)
    cli("remove", "pear", "--old")
    assert pear.answers() == content(three)
