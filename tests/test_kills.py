"""kill -9 at random moments of real runs: the same command ends where an uninterrupted run ends. Slow."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_training import ROOT, SCRIPTS, command, history, weights_hash

pytestmark = pytest.mark.slow


def start(arguments: list[str], *, log) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stderr=log, stdout=log)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_that_is_killed_at_random_moments_ends_as_an_uninterrupted_one(
    stage, model_dir, data_dir, tmp_path
):
    """A checkpoint after every step, so that many kills fall into a write; then once to the end."""
    generator = random.Random(stage)
    flags = {"lora_dropout": 0.1, "max_steps": 40, "save_steps": 1, "save_total_limit": 2, "do_eval": False}
    arguments = [SCRIPTS[stage], *command(stage, model_dir, data_dir, tmp_path / "whole", **flags)]
    with open(tmp_path / "log", "wb") as log:
        assert start(arguments, log=log).wait() == 0
        killed = 0
        arguments = [SCRIPTS[stage], *command(stage, model_dir, data_dir, tmp_path / "killed", **flags)]
        for _ in range(6):
            process = start(arguments, log=log)
            deadline = time.monotonic() + 60
            while not list((tmp_path / "killed").glob("checkpoint-*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(generator.uniform(0, 8 if killed else 1))
            killed += process.poll() is None
            process.kill()
            process.wait()
        assert killed
        assert start(arguments, log=log).wait() == 0
    names = ("loss", "grad_norm", "learning_rate")
    assert repr(history(tmp_path / "killed", *names)) == repr(history(tmp_path / "whole", *names))
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")


def test_sigterm_to_a_real_run_saves_and_exits_with_75_and_a_second_one_exits_at_once(
    model_dir, data_dir, tmp_path
):
    flags = {"max_steps": 100_000, "save_steps": 100_000, "save_strategy": "steps", "do_eval": False}
    arguments = [SCRIPTS["sft"], *command("sft", model_dir, data_dir, tmp_path / "o", **flags)]
    for signals, code in ([signal.SIGTERM], 75), ([signal.SIGINT], 75):
        with open(tmp_path / "log", "wb") as log:
            process = start(arguments, log=log)
            while b"step=2" not in (tmp_path / "log").read_bytes():
                time.sleep(0.1)
                assert process.poll() is None, (tmp_path / "log").read_text()
            for number in signals:
                process.send_signal(number)
            assert process.wait(timeout=60) == code
    assert list((tmp_path / "o").glob("checkpoint-*"))


def test_a_merge_killed_at_random_moments_leaves_nothing_that_looks_whole(model_dir, data_dir, tmp_path):
    import supervised_finetuning
    from medicalgpt.checkpoint import why_not_whole

    supervised_finetuning.main(command("sft", model_dir, data_dir, tmp_path / "a", max_steps=1))
    arguments = ["merge_peft_adapter.py", "--base_model", str(model_dir), "--lora_model", str(tmp_path / "a"),
                 "--output_dir", str(tmp_path / "m")]  # fmt: skip
    generator = random.Random(0)
    with open(tmp_path / "log", "wb") as log:
        for _ in range(8):
            process = start(arguments, log=log)
            time.sleep(generator.uniform(3.5, 6))
            process.kill()
            process.wait()
            assert not (tmp_path / "m").exists() or why_not_whole(tmp_path / "m") is None
        assert start(arguments, log=log).wait() == 0
    assert why_not_whole(tmp_path / "m") is None
