"""What is written is whole or not there; what is not whole is never taken; a command continues only its own run."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.checkpoint import (
    HELD_LOCKS,
    MANIFEST,
    checkpoints,
    fingerprint,
    lock,
    nearest_path,
    newest_whole,
    publish,
    replace_directory,
    rotate,
    seal,
    staged,
    why_not_whole,
    write_json,
)
from medicalgpt.errors import ConfigError, ModelError, RunError
from medicalgpt.run_record import RunRecord, check_base, read_run, recorded_template

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
OLD = {"weights.bin": "old weights", "nested/state.json": "old state", "only_old.txt": "old"}
NEW = {"weights.bin": "new weights", "nested/state.json": "new state", "only_new.txt": "new"}


def fill(directory: Path, files: dict[str, str]) -> Path:
    """Write files into a directory."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def content(directory: Path) -> dict[str, str]:
    """Return {name: text} of everything but the manifest."""
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def whole(directory: Path, files: dict[str, str] = OLD) -> Path:
    """Write a whole directory."""
    seal(fill(directory, files))
    return directory


# ---- writing -----------------------------------------------------------------------------------------------


def test_a_staged_directory_appears_whole_and_leaves_nothing_beside(tmp_path):
    target = tmp_path / "deep" / "merged"
    with staged(target) as partial:
        fill(partial, NEW)
        assert not target.exists()
        assert partial.parent == target.parent
    assert content(target) == NEW
    assert why_not_whole(target) is None
    assert os.listdir(target.parent) == ["merged"]


def test_an_empty_directory_is_a_place_to_write_to(tmp_path):
    (tmp_path / "merged").mkdir()
    with staged(tmp_path / "merged") as partial:
        fill(partial, NEW)
    assert content(tmp_path / "merged") == NEW
    assert os.listdir(tmp_path) == ["merged"]


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path):
    """printf abc | sha256sum"""
    with staged(tmp_path / "merged") as partial:
        fill(partial, {"a/b.txt": "abc"})
    assert json.loads((tmp_path / "merged" / MANIFEST).read_text()) == {
        "files": {
            "a/b.txt": {
                "size": 3,
                "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            }
        }
    }


@pytest.mark.parametrize("fault", [ValueError("NaN"), KeyboardInterrupt(), SystemExit(75)])
def test_a_fault_while_writing_leaves_the_target_as_it_was(tmp_path, fault):
    target = whole(tmp_path / "merged")
    with pytest.raises(type(fault)), staged(target, overwrite=True) as partial:
        fill(partial, NEW)
        raise fault
    assert content(target) == OLD
    assert why_not_whole(target) is None
    assert os.listdir(tmp_path) == ["merged"]


def test_a_full_disk_is_a_fault_of_the_run_in_one_line_and_the_half_is_removed(tmp_path):
    target = whole(tmp_path / "merged")
    message = r"^\S+/merged could not be written: \[Errno 28\] No space left on device; \d+\.\d\d GB free; nothing was changed$"
    with pytest.raises(RunError, match=message) as fault, staged(target, overwrite=True) as partial:
        fill(partial, NEW)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert fault.value.exit_code == 1
    assert content(target) == OLD
    assert os.listdir(tmp_path) == ["merged"]


def test_a_directory_with_content_is_refused_and_not_touched(tmp_path):
    target = fill(tmp_path / "merged", {"thesis.txt": "mine"})
    message = r"merged exists and is not empty; use --overwrite"
    with pytest.raises(ConfigError, match=message) as refusal, staged(target):
        pytest.fail("nothing may be computed for a target that is refused")
    assert refusal.value.exit_code == 2
    assert content(target) == {"thesis.txt": "mine"}
    assert os.listdir(tmp_path) == ["merged"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "merged").write_text("x")
    with pytest.raises(ConfigError, match="merged is a file"), staged(tmp_path / "merged", overwrite=True):
        pytest.fail("nothing may be computed for a target that is refused")
    assert (tmp_path / "merged").read_text() == "x"


def test_overwriting_replaces_all_of_the_old_content(tmp_path):
    target = whole(tmp_path / "merged")
    with staged(target, overwrite=True) as partial:
        fill(partial, NEW)
    assert content(target) == NEW
    assert why_not_whole(target) is None
    assert os.listdir(tmp_path) == ["merged"]


def test_what_an_interrupted_write_left_behind_does_not_get_into_the_next(tmp_path):
    fill(tmp_path / "merged.partial", {"stale.txt": "x"})
    with staged(tmp_path / "merged") as partial:
        fill(partial, NEW)
    assert content(tmp_path / "merged") == NEW


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_umask_says_whatever_a_library_made_them(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        with staged(tmp_path / "merged") as partial:
            fill(partial, NEW)
            (partial / "weights.bin").chmod(0o600)
            (partial / "only_new.txt").chmod(0o777)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert modes == {expected}


def test_publishing_moves_files_and_directories_and_keeps_what_else_is_there(tmp_path):
    target = fill(tmp_path / "out", {"weights.bin": "old", "nested/gone.txt": "old", "logs/events": "log"})
    publish(fill(target / "final.partial", NEW), target)
    assert content(target) == NEW | {"logs/events": "log"}
    assert why_not_whole(target) is None


def test_a_json_file_is_replaced_as_one_and_keeps_every_character(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})
    write_json(file, {"question": "咳嗽怎么办？"})
    assert file.read_text(encoding="utf-8") == '{\n  "question": "咳嗽怎么办？"\n}\n'
    assert os.listdir(tmp_path) == ["run.json"]


# ---- a process that is killed at any moment ----------------------------------------------------------------

FILE_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}


def killed_before_operation(number: int, write: Callable[[], None], directory: Path) -> bool:
    """Run `write` in a child that dies before its `number`-th file operation; False when it came to its end.

    Operations are the interpreter's audit events that open, make, rename or remove something under
    `directory`, or change its mode, and every fsync.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        def watch(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and (event != "open" or str(arguments[0]).startswith(str(directory))):
                step()

        os.fsync = lambda handle: step()  # a killed process loses nothing that it wrote, synced or not
        sys.addaudithook(watch)
        try:
            write()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the write itself failed"
    return code == 9


def each_kill(tmp_path: Path, prepare: Callable[[Path], Path], write: Callable[[Path], None]):
    """Yield (number of the operation that never happened, target) for every operation of `write`."""
    for number in range(1, 500):
        place = tmp_path / str(number)
        place.mkdir()
        target = prepare(place)
        if not killed_before_operation(number, lambda target=target: write(target), place):
            assert number > 10, "the kill did not reach the write"
            assert content(target) == NEW
            return
        yield number, target
        shutil.rmtree(place)
    pytest.fail("the write never came to its end")


def write_new(target: Path) -> None:
    with staged(target, overwrite=True) as partial:
        fill(partial, NEW)


def test_a_kill_at_any_moment_of_a_replacement_leaves_no_mixture_that_looks_whole(tmp_path):
    """What stands under the target's name is the whole old, the whole new, or nothing; and one of both exists."""
    for number, target in each_kill(tmp_path, lambda place: whole(place / "merged"), write_new):
        if target.exists():
            assert why_not_whole(target) is None, number
            assert content(target) in (OLD, NEW), number
        rest = [path for path in target.parent.iterdir() if why_not_whole(path) is None]
        assert any(content(path) in (OLD, NEW) for path in rest), number


def test_after_a_kill_at_any_moment_the_same_write_succeeds(tmp_path):
    for number, target in each_kill(tmp_path, lambda place: whole(place / "merged"), write_new):
        write_new(target)
        assert content(target) == NEW, number
        assert os.listdir(target.parent) == ["merged"], number


def test_a_first_write_that_is_killed_leaves_nothing_that_looks_whole_but_the_whole(tmp_path):
    for number, target in each_kill(tmp_path, lambda place: place / "merged", write_new):
        if target.exists():
            assert why_not_whole(target) is None, number
            assert content(target) == NEW, number


def publish_new(target: Path) -> None:
    publish(fill(target / "final.partial", NEW), target)


def test_a_kill_at_any_moment_of_publishing_leaves_no_mixture_that_looks_whole(tmp_path):
    """What is old has the content of what is new, so that its manifest would still be true in between."""
    old = {"weights.bin": NEW["weights.bin"]}
    for number, target in each_kill(tmp_path, lambda place: whole(place / "out", old), publish_new):
        if why_not_whole(target) is None:
            kept = {n: t for n, t in content(target).items() if not n.startswith("final.partial/")}
            assert kept in (old, NEW), number


# ---- what is whole -----------------------------------------------------------------------------------------


def remove_file(directory: Path) -> None:
    (directory / "nested/state.json").unlink()


def truncate_file(directory: Path) -> None:
    os.truncate(directory / "weights.bin", 4)


def alter_file(directory: Path) -> None:
    (directory / "weights.bin").write_text("0ld weights")


def remove_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def truncate_manifest(directory: Path) -> None:
    os.truncate(directory / MANIFEST, 20)


def zero_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_bytes(bytes(200))


def empty_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (remove_file, "nested/state.json is missing"),
        (truncate_file, "weights.bin has 4 bytes, not 11"),
        (alter_file, "weights.bin has other content than was written"),
        (remove_manifest, "no MANIFEST.json"),
        (truncate_manifest, "MANIFEST.json is damaged"),
        (zero_manifest, "MANIFEST.json is damaged"),
        (empty_manifest, "MANIFEST.json is damaged"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, why):
    directory = whole(tmp_path / "checkpoint-5")
    assert why_not_whole(directory) is None
    damage(directory)
    assert why_not_whole(directory) == why


def test_a_directory_that_does_not_exist_is_not_whole(tmp_path):
    assert why_not_whole(tmp_path / "nowhere") == "no MANIFEST.json"


def test_checkpoints_are_ordered_by_step_and_nothing_else_counts(tmp_path):
    for name in (
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
        "checkpoint-9.partial",
        "my-checkpoint-1",
        "logs",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]


def test_the_newest_whole_checkpoint_is_taken_and_every_torn_newer_one_named(tmp_path):
    for step in (9, 20, 100):
        whole(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "weights.bin").unlink()
    assert newest_whole(tmp_path) == (
        tmp_path / "checkpoint-20",
        ["checkpoint-100: weights.bin is missing"],
    )


def test_a_torn_checkpoint_older_than_the_newest_is_nobodys_concern(tmp_path):
    whole(tmp_path / "checkpoint-20")
    fill(tmp_path / "checkpoint-9", OLD)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-20", [])


def test_checkpoints_that_are_all_torn_are_refused_with_the_reason_of_each(tmp_path):
    fill(tmp_path / "checkpoint-9", OLD)
    truncate_file(whole(tmp_path / "checkpoint-20"))
    message = (
        r"no checkpoint is whole \(checkpoint-20: weights.bin has 4 bytes, not 11; "
        r"checkpoint-9: no MANIFEST.json\); .*--overwrite_output_dir True"
    )
    with pytest.raises(ModelError, match=message) as refusal:
        newest_whole(tmp_path)
    assert refusal.value.exit_code == 4


@pytest.mark.parametrize("name", ["out", "nowhere"])
def test_a_run_without_checkpoints_has_none(tmp_path, name):
    (tmp_path / "out").mkdir()
    assert newest_whole(tmp_path / name) == (None, [])


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(2, [100, 200]), (1, [200]), (9, [9, 20, 100, 200]), (None, [9, 20, 100, 200])],
)
def test_the_newest_checkpoints_by_step_are_kept(tmp_path, limit, kept):
    """By name, checkpoint-9 would be the newest and checkpoint-100 the oldest."""
    for step in (200, 9, 100, 20):
        whole(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, limit)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


# ---- fingerprints and names --------------------------------------------------------------------------------


def save_weights(directory: Path, **changes: np.ndarray) -> Path:
    """Write a tiny model's weights."""
    directory.mkdir()
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, dtype=np.float32)}
    save_file(tensors | changes, directory / "model.safetensors")
    return directory


def test_a_copy_has_the_same_fingerprint(tmp_path):
    one = save_weights(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") == fingerprint(one)
    assert len(fingerprint(one)) == 32


def test_one_changed_weight_changes_the_fingerprint(tmp_path):
    changed = np.ones(4, dtype=np.float32)
    changed[2] = np.nextafter(np.float32(1), np.float32(2))
    one, other = save_weights(tmp_path / "one"), save_weights(tmp_path / "other", b=changed)
    assert fingerprint(one) != fingerprint(other)


def test_a_renamed_or_reshaped_tensor_changes_the_fingerprint(tmp_path):
    flat = np.arange(6, dtype=np.float32)
    prints = [
        fingerprint(save_weights(tmp_path / "one")),
        fingerprint(save_weights(tmp_path / "flat", a=flat)),
        fingerprint(save_weights(tmp_path / "more", c=flat)),
    ]
    assert len(set(prints)) == 3


def test_a_path_that_does_not_exist_brings_the_nearest_directory_to_mind(tmp_path):
    (tmp_path / "merged-sft-qwen-v1").mkdir()
    (tmp_path / "merged-sft-qwen-v2x").write_text("a file")
    assert nearest_path(tmp_path / "merged-sft-qwen-v2") == (f"; did you mean {tmp_path}/merged-sft-qwen-v1?")


@pytest.mark.parametrize("name", ["zzz", "nowhere/merged-sft-qwen-v1"])
def test_a_path_like_nothing_brings_nothing_to_mind(tmp_path, name):
    (tmp_path / "merged-sft-qwen-v1").mkdir()
    assert nearest_path(tmp_path / name) == ""


# ---- one run at a time -------------------------------------------------------------------------------------

HOLD = "import sys, time, pathlib, medicalgpt.checkpoint as c; c.lock(pathlib.Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_directory_that_another_process_holds_is_refused_with_its_pid(tmp_path, holder):
    with pytest.raises(ConfigError, match=rf"/out is in use by pid {holder.pid} on \S+; .*--output_dir"):
        lock(tmp_path / "out")


def test_a_directory_is_free_again_when_its_process_was_killed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock(tmp_path / "out")
    assert f"pid {os.getpid()} " in (tmp_path / "out" / ".lock").read_text()


def test_a_process_may_ask_again_for_what_it_holds(tmp_path):
    lock(tmp_path / "out")
    (tmp_path / "x").mkdir()
    lock(tmp_path / "x" / ".." / "out")
    held = [directory for directory in HELD_LOCKS if directory == (tmp_path / "out").resolve()]
    assert len(held) == 1


def test_a_lock_names_its_holder_and_no_earlier_one(tmp_path):
    (tmp_path / ".lock").write_text("pid 123456789123456789 on a-machine-with-a-very-long-name\n")
    lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


# ---- the record of a run -----------------------------------------------------------------------------------


@dataclass
class Flags:
    """A stage's flags, in small."""

    output_dir: str
    learning_rate: float = 0.1
    target_modules: str = "all"
    logging_steps: int = 10
    seed: int = 42


@dataclass
class Stage:
    """What a record reads of a stage's flags."""

    run: Flags

    def groups(self) -> list[Flags]:
        return [self.run]


def record(
    output_dir: Path, *, stage: str = "pt", base: str = "f1", data: str = "d1", world_size: int = 1, **flags
) -> RunRecord:
    run = Flags(str(output_dir), **flags)
    run.world_size = world_size
    return RunRecord.begin(
        stage,
        Stage(run),
        base={"path": "base", "fingerprint": base, "config": None, "tokenizer": None, "adapter": None},
        data={"a.jsonl": data},
        template="qwen",
        parent=None,
    )


def compare(run: RunRecord) -> bool:
    """Return whether the run is complete, as a stage asks."""
    run.check_place()
    return run.is_complete()


def complete(output_dir: Path, **options) -> None:
    """Write the record of a finished run, as a stage does."""
    partial = output_dir / "final.partial"
    partial.mkdir(parents=True)
    RunRecord(partial, record(output_dir, **options).content).save(status="complete", results={"loss": 1.5})
    publish(partial, output_dir)


def test_a_new_directory_holds_no_run(tmp_path):
    assert compare(record(tmp_path / "out")) is False
    assert not (tmp_path / "out").exists()


def test_the_same_command_after_an_interruption_is_the_same_run_and_not_complete(tmp_path):
    record(tmp_path / "out").save()
    assert read_run(tmp_path / "out")["status"] == "running"
    assert compare(record(tmp_path / "out")) is False


def test_the_same_command_after_the_end_is_complete(tmp_path):
    complete(tmp_path / "out")
    again = record(tmp_path / "out")
    assert compare(again) is True


def test_a_finished_run_whose_files_are_damaged_is_not_complete(tmp_path):
    complete(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    assert compare(record(tmp_path / "out")) is False


def test_a_changed_flag_is_refused_old_to_new_and_nothing_is_touched(tmp_path):
    complete(tmp_path / "out")
    before = content(tmp_path / "out")
    message = (
        r"/out holds another run \(learning_rate: 0\.1 → 0\.2; target_modules: all → q_proj\); "
        r".*--overwrite_output_dir True"
    )
    with pytest.raises(ConfigError, match=message) as refusal:
        compare(record(tmp_path / "out", learning_rate=0.2, target_modules="q_proj"))
    assert refusal.value.exit_code == 2
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "f2"}, r"\(base: f1 → f2\)"),
        ({"data": "d2"}, r'\(data: \["d1"\] → \["d2"\]\)'),
        ({"world_size": 2}, r"\(world_size: 1 → 2\)"),
        ({"seed": 7}, r"\(seed: 42 → 7\)"),
        ({"stage": "sft"}, r"\(stage: pt → sft\)"),
    ],
)
def test_whatever_changes_the_numbers_makes_another_run(tmp_path, change, message):
    record(tmp_path / "out").save()
    with pytest.raises(ConfigError, match=message):
        compare(record(tmp_path / "out", **change))


def test_a_flag_that_changes_no_number_makes_no_other_run(tmp_path):
    complete(tmp_path / "out")
    assert compare(record(tmp_path / "out", logging_steps=1)) is True


def test_a_run_that_was_moved_is_still_the_same_run(tmp_path):
    complete(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert compare(record(tmp_path / "moved")) is True


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoint-5/weights.bin", "data/a.jsonl"])
def test_a_directory_of_something_else_is_refused_and_not_touched(tmp_path, name):
    fill(tmp_path / "out", {name: "mine"})
    with pytest.raises(ConfigError, match=r"--output_dir .*/out is not empty and holds no run\.json"):
        compare(record(tmp_path / "out"))
    assert content(tmp_path / "out") == {name: "mine"}


def test_a_file_is_no_output_directory(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match=r"--output_dir .*/out is a file"):
        compare(record(tmp_path / "out"))


@pytest.mark.parametrize("name", [".lock", "logs/events", "saving.partial/weights.bin"])
def test_what_a_stage_leaves_before_its_first_record_is_nothing_else(tmp_path, name):
    fill(tmp_path / "out", {name: "x"})
    assert compare(record(tmp_path / "out")) is False


def test_clearing_removes_a_run_and_leaves_the_lock(tmp_path):
    complete(tmp_path / "out")
    fill(tmp_path / "out", {".lock": "pid 1", "logs/events": "x", "checkpoint-5/weights.bin": "x"})
    record(tmp_path / "out").clear()
    assert content(tmp_path / "out") == {".lock": "pid 1"}
    assert compare(record(tmp_path / "out")) is False


def test_clearing_removes_nothing_where_there_is_no_run(tmp_path):
    fill(tmp_path / "out", {"thesis.txt": "mine", "logs/mine": "x"})
    record(tmp_path / "out").clear()
    assert content(tmp_path / "out") == {"thesis.txt": "mine", "logs/mine": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"run\.json is damaged"),
        ("", r"run\.json is damaged"),
        ("[1]", "is not a record"),
        ("{}", "is not a record"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(tmp_path, text, message):
    fill(tmp_path, {"run.json": text})
    with pytest.raises(ModelError, match=message) as refusal:
        read_run(tmp_path)
    assert refusal.value.exit_code == 4


def test_a_template_is_known_where_it_was_written_down(tmp_path):
    record(tmp_path / "out").save()
    assert recorded_template(tmp_path / "out") == "qwen"
    assert recorded_template(tmp_path) is None


def adapter_on(base: Path, directory: Path) -> Path:
    """Write an adapter that was trained on `base`."""
    save_weights(directory, a=np.zeros((2, 3), dtype=np.float32))
    record(directory, base=fingerprint(base)).save()
    return directory


def test_an_adapter_fits_the_base_it_was_trained_on_wherever_that_is(tmp_path):
    base = save_weights(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "copy")
    assert check_base(adapter, base) is True
    assert check_base(adapter, tmp_path / "copy") is True


def test_another_base_is_refused_with_both_fingerprints(tmp_path):
    base, other = save_weights(tmp_path / "base"), save_weights(tmp_path / "other", b=np.zeros(4, np.float32))
    adapter = adapter_on(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=rf"{fingerprint(base)}\), not on .*/other .*{fingerprint(other)}"):
        check_base(adapter, other)


def test_a_base_that_already_contains_the_adapter_is_refused(tmp_path):
    base = save_weights(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    merged = save_weights(tmp_path / "merged", b=np.zeros(4, np.float32))
    RunRecord(
        merged,
        {
            "stage": "merge",
            "base": {"path": "base", "fingerprint": fingerprint(base)},
            "adapter": {"fingerprint": fingerprint(adapter)},
        },
    ).save()
    with pytest.raises(ModelError, match=r"/merged already contains .*/adapter; use the base .*, base$"):
        check_base(adapter, merged)


def test_an_adapter_made_elsewhere_is_neither_confirmed_nor_refused(tmp_path):
    base, adapter = save_weights(tmp_path / "base"), save_weights(tmp_path / "adapter")
    assert check_base(adapter, base) is False


def test_replacing_a_directory_deletes_the_old_one_only_after_the_new_has_its_name(tmp_path, monkeypatch):
    target, source = whole(tmp_path / "merged"), whole(tmp_path / "merged.partial", NEW)
    real, present = shutil.rmtree, []

    def look(path, **options):
        present.append((Path(path).exists(), target.exists() and content(target) == NEW))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    replace_directory(source, target)
    assert [new_is_there for old_is_there, new_is_there in present if old_is_there] == [True]


# ---- found by an independent tester ------------------------------------------------------------------------


def test_the_target_is_there_at_every_moment_of_a_replacement(tmp_path):
    for number, target in each_kill(tmp_path, lambda path: whole(path / "merged"), write_new):
        assert target.exists(), f"before operation {number}: {sorted(os.listdir(target.parent))}"


def test_a_replacement_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
    target, rename = whole(tmp_path / "merged"), os.rename

    def failing(a, b):
        if str(a).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr("medicalgpt.checkpoint.exchange", lambda a, b: False)  # a file system without it
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(RunError, match="nothing was changed"), staged(target, overwrite=True) as partial:
        fill(partial, NEW)
    assert content(target) == OLD


def test_a_file_system_without_exchange_replaces_by_two_renames(tmp_path, monkeypatch):
    target = whole(tmp_path / "merged")
    monkeypatch.setattr("medicalgpt.checkpoint.exchange", lambda a, b: False)
    with staged(target, overwrite=True) as partial:
        fill(partial, NEW)
    assert content(target).items() >= NEW.items()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_mistake_inside_a_write_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "m"):
        Path("/nowhere/x").read_bytes()


@pytest.mark.parametrize(
    "text", ["[]", '{"files": []}', '{"files": {"weights.bin": {}}}', '{"files": {"weights.bin": 5}}']
)
def test_a_manifest_of_another_shape_is_damaged(tmp_path, text):
    directory = whole(tmp_path / "c")
    (directory / MANIFEST).write_text(text)
    assert why_not_whole(directory) == f"{MANIFEST} is damaged"


def test_a_fingerprint_sees_a_change_in_the_middle_of_a_large_file(tmp_path):
    """4 MiB of one tensor: the change is further than 1 MiB from both ends."""
    weights = np.zeros(2**20, np.float32)
    prints = []
    for name, value in (("a", 0.0), ("b", 1.0)):
        weights[2**19] = value
        (tmp_path / name).mkdir()
        save_file({"w": weights}, tmp_path / name / "model.safetensors")
        prints.append(fingerprint(tmp_path / name))
    assert prints[0] != prints[1]


def test_a_merged_model_is_no_output_directory(tmp_path):
    RunRecord(tmp_path / "out", {"stage": "merge", "status": "complete"}).save()
    with pytest.raises(ConfigError, match="holds a merged model"):
        compare(record(tmp_path / "out"))


def test_clearing_keeps_what_somebody_put_beside_the_run(tmp_path):
    complete(tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    record(tmp_path / "out").clear()
    assert content(tmp_path / "out") == {"thesis.txt": "mine"}
