"""The launchers run their stage with what the machine has, the same effective batch, and the stage's exit code."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from medicalgpt.flags import parse_arguments
from medicalgpt.launch import plan, run

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(
    path.name for path in ROOT.glob("run_*.sh") if "\nsource medicalgpt/launch.sh" in path.read_text()
)
STAGES = {
    "run_pt.sh": "pretraining",
    "run_sft.sh": "supervised_finetuning",
    "run_rm.sh": "reward_modeling",
    "run_ppo.sh": "ppo_training",
    "run_dpo.sh": "dpo_training",
}
ONE_PROCESS = {"run_rm.sh", "run_ppo.sh"}
STAGE_LINE = re.compile(
    r"^CUDA_VISIBLE_DEVICES=(?:0,1 torchrun --nproc_per_node 2|0 torchrun --nproc_per_node 1) (\w+)\.py \\$",
    re.MULTILINE,
)


def executable(file: Path, text: str) -> None:
    """Write a shell script that can be run by its name."""
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def set_gpus(tmp_path, monkeypatch):
    """Let nvidia-smi list as many GPUs as the test says."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_number(number: int) -> Path:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(number))
        executable(directory / "nvidia-smi", f'test "$*" = -L || exit 1\n{lines}')
        return directory

    return set_number


def torchrun(text: str) -> list[str]:
    """Return a command line as the launcher function gets it."""
    return shlex.split(text)


# ---- how many processes ------------------------------------------------------------------------------------


def test_with_all_gpus_the_command_is_the_one_that_was_written(set_gpus):
    set_gpus(2)
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "HOME": "/root"}
    line = torchrun("--nproc_per_node 2 x.py --gradient_accumulation_steps 4 --max_steps 3")
    assert plan(line, environment) == (["torchrun", "--standalone", *line], environment, None)


def test_with_half_the_gpus_the_accumulation_doubles_and_one_line_says_so(set_gpus):
    set_gpus(1)
    line = torchrun("--nproc_per_node 2 x.py --gradient_accumulation_steps 4 --max_steps 3")
    command, environment, message = plan(line, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert command == torchrun(
        "python x.py --gradient_accumulation_steps 4 --max_steps 3 --gradient_accumulation_steps 8"
    )
    assert environment == {"CUDA_VISIBLE_DEVICES": "0"}
    assert message == (
        "launch: 1 of 2 GPUs are there, so processes=1 with --gradient_accumulation_steps 8 instead of 4 "
        "(same effective batch)"
    )


def test_without_a_gpu_it_is_one_process(set_gpus):
    set_gpus(0)
    line = torchrun("--nproc_per_node 2 x.py --gradient_accumulation_steps 4")
    command, environment, message = plan(line, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert command == torchrun("python x.py --gradient_accumulation_steps 4 --gradient_accumulation_steps 8")
    assert environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert message.startswith("launch: 0 of 2 GPUs are there, so processes=1 ")


def test_a_machine_without_nvidia_smi_has_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    command, _, message = plan(torchrun("--nproc_per_node 2 x.py --gradient_accumulation_steps 1"), {})
    assert command[0] == "python"
    assert message.startswith("launch: 0 of 2 GPUs")


@pytest.mark.parametrize(
    ("accumulation", "processes", "new_accumulation"),
    [(1, 1, 3), (2, 2, 3), (4, 2, 6)],
)
def test_a_number_of_processes_that_does_not_divide_the_batch_is_passed_over(
    set_gpus, accumulation, processes, new_accumulation
):
    """3 processes × 1 = 3 = 1 × 3, no whole number for 2 processes; 3 × 2 = 6 = 2 × 3; 3 × 4 = 12 = 2 × 6."""
    set_gpus(2)
    command, environment, message = plan(
        torchrun(f"--nproc_per_node 3 x.py --gradient_accumulation_steps {accumulation}"), {}
    )
    begin = ["python"] if processes == 1 else ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    assert command[: len(begin) + 1] == [*begin, "x.py"]
    assert command[-2:] == ["--gradient_accumulation_steps", str(new_accumulation)]
    assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(["0", "1"][:processes])
    assert f"2 of 3 GPUs are there, so processes={processes} " in message


def test_of_a_flag_that_is_given_twice_the_last_one_counts(set_gpus):
    set_gpus(1)
    line = torchrun(
        "--nproc_per_node 2 x.py --gradient_accumulation_steps 4 --seed 1 --gradient_accumulation_steps 1"
    )
    assert plan(line, {})[0][-2:] == ["--gradient_accumulation_steps", "2"]


@pytest.mark.parametrize("option", ["--nproc_per_node=2", "--nproc-per-node 2", "--nproc-per-node=2"])
def test_every_spelling_of_a_flag_is_understood(set_gpus, option):
    set_gpus(1)
    command, _, message = plan(torchrun(f"{option} x.py --gradient_accumulation_steps=4"), {})
    assert command == torchrun("python x.py --gradient_accumulation_steps=4 --gradient_accumulation_steps 8")
    assert "1 of 2 GPUs" in message


def test_one_process_on_one_gpu_needs_no_torchrun_and_no_message(set_gpus):
    set_gpus(2)
    line = torchrun("--nproc_per_node 1 x.py --gradient_accumulation_steps 4")
    command, environment, message = plan(line, {"CUDA_VISIBLE_DEVICES": "1"})
    assert (command, environment["CUDA_VISIBLE_DEVICES"], message) == (["python", *line[2:]], "1", None)


@pytest.mark.parametrize(
    ("named", "existing", "expected"),
    [("2,3", 4, "2,3"), ("2,3", 3, "2"), ("GPU-1a,GPU-2b", 2, "GPU-1a,GPU-2b"), ("", 4, ""), (None, 4, None)],
)
def test_the_gpus_that_are_used_are_those_that_are_named_and_exist(set_gpus, named, existing, expected):
    set_gpus(existing)
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    line = torchrun("--nproc_per_node 2 x.py --gradient_accumulation_steps 4")
    assert plan(line, environment)[1].get("CUDA_VISIBLE_DEVICES") == expected


@pytest.mark.parametrize(
    "option", ["--nnodes 2", "--nnodes=2", "--rdzv_endpoint host:1", "--master_addr host"]
)
def test_several_nodes_are_left_to_torchrun(set_gpus, option):
    set_gpus(1)
    line = torchrun(f"{option} --nproc_per_node 2 x.py --gradient_accumulation_steps 4")
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert plan(line, environment) == (["torchrun", *line], environment, None)


# ---- how it ends -------------------------------------------------------------------------------------------


@pytest.fixture
def _signals():
    """Put back the signal handlers that run() sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 4", 4),
        ('printf 3 >"$MEDICALGPT_EXIT_FILE"; exit 1', 3),
        ('printf 75 >"$MEDICALGPT_EXIT_FILE"; exit 1', 75),
        ('printf 3 >"$MEDICALGPT_EXIT_FILE"; exit 0', 0),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
        ('printf 2 >"$MEDICALGPT_EXIT_FILE"; kill -KILL $$', 2),
    ],
)
def test_the_exit_code_is_the_one_that_the_stage_wrote_or_its_own(script, code):
    """torchrun answers every worker's code with 1, so the stage writes its own; killed by signal n is 128 + n."""
    assert run(["bash", "-c", script], dict(os.environ)) == code


@pytest.mark.usefixtures("_signals")
def test_no_exit_file_is_left_behind(tmp_path):
    run(["bash", "-c", f'echo "$MEDICALGPT_EXIT_FILE" >{tmp_path}/name'], dict(os.environ))
    assert not Path((tmp_path / "name").read_text().strip()).exists()


def test_a_request_to_stop_reaches_the_stage_and_its_answer_comes_back(set_gpus, tmp_path):
    directory = set_gpus(0)
    executable(directory / "python", f'exec {sys.executable} "$@"')
    (tmp_path / "stage.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "medicalgpt.launch", "--nproc_per_node", "1", str(tmp_path / "stage.py")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.terminate()
        _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert errors == "STOPPED with exit code 75: the same command continues\n"


# ---- the launchers -----------------------------------------------------------------------------------------


@pytest.fixture
def launch(set_gpus, tmp_path):
    """Run a launcher with stubs for python and torchrun; return (what it would execute, the process)."""
    directory = set_gpus(2)
    stub = f'printf "%s\\0" "$(basename "$0")" "$@" >{tmp_path}/command; exit "${{STAGE_CODE:-0}}"'
    executable(directory / "torchrun", stub)
    executable(directory / "python", f'test "$1" != -m || exec {sys.executable} "$@"\n{stub}')

    def start(name: str, *arguments: str, gpus: int = 2, code: int = 0, cwd: Path = tmp_path):
        set_gpus(gpus)
        process = subprocess.run(
            ["bash", str(ROOT / name), *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "STAGE_CODE": str(code)},
        )
        return (tmp_path / "command").read_text().split("\0")[:-1], process

    return start


def test_every_stage_has_its_launcher():
    assert set(LAUNCHERS) >= set(STAGES)
    for name, module in STAGES.items():
        assert STAGE_LINE.findall((ROOT / name).read_text()) == [module]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_its_stage_from_the_projects_root_wherever_it_is_called(launch, name, tmp_path):
    command, process = launch(name, cwd=tmp_path)
    (module,) = STAGE_LINE.findall((ROOT / name).read_text())
    alone = name in ONE_PROCESS
    started = ["python"] if alone else ["torchrun", "--standalone", "--nproc_per_node", "2"]
    assert command[: len(started) + 1] == [*started, f"{module}.py"]
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_arguments_behind_a_launchers_name_come_last_and_unchanged(launch, name):
    extra = ["--output_dir", "my model's dir", "--system", 'say "hi" $HOME `ls` \\n * 医', "", "--x=a b"]
    assert launch(name, *extra)[0][-6:] == extra


@pytest.mark.parametrize("name", sorted({*LAUNCHERS} - ONE_PROCESS))
def test_without_gpu_a_launcher_runs_one_process_with_twice_the_accumulation(launch, name):
    command, process = launch(name, gpus=0)
    assert command[0] == "python"
    assert command[-2:] == ["--gradient_accumulation_steps", "8"]
    assert process.stderr == (
        "launch: 0 of 2 GPUs are there, so processes=1 with --gradient_accumulation_steps 8 instead of 4 "
        "(same effective batch)\n"
    )


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("code", [1, 3])
def test_the_last_line_of_a_failure_says_failed_with_the_code(launch, gpus, code):
    _, process = launch("run_sft.sh", gpus=gpus, code=code)
    assert process.returncode == code
    assert process.stderr.splitlines()[-1] == f"FAILED with exit code {code}"


def test_a_run_that_was_stopped_did_not_fail(launch):
    _, process = launch("run_sft.sh", code=75)
    assert process.returncode == 75
    assert process.stderr.splitlines()[-1] == "STOPPED with exit code 75: the same command continues"


EDITED = [
    "--model_name_or_path",
    "--train_file_dir",
    "--validation_file_dir",
    "--per_device_train_batch_size",
    "--gradient_accumulation_steps",
    "--max_train_samples",
    "--max_steps",
    "--num_train_epochs",
    "--output_dir",
]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_line_that_the_guide_tells_users_to_edit_stands_in_a_launcher_once(name):
    lines = (ROOT / name).read_text().splitlines()
    assert sum(bool(STAGE_LINE.fullmatch(line)) for line in lines) == 1
    own = {"--model_name_or_path": "--sft_model_path"} if name == "run_ppo.sh" else {}
    for flag in [own.get(flag, flag) for flag in EDITED]:
        assert sum(bool(re.fullmatch(rf"    {flag} \S+ \\", line)) for line in lines) == 1, flag
    assert lines[-1] == '    "$@"'


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_can_be_executed_and_stops_at_the_first_error(name):
    assert os.access(ROOT / name, os.X_OK)
    lines = (ROOT / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


OWN_TO_A_LAUNCHER = {
    "model_name_or_path",
    "sft_model_path",
    "reward_model_path",
    "train_file_dir",
    "validation_file_dir",
    "template_name",
    "max_train_samples",
    "max_eval_samples",
}


class ParsedError(Exception):
    """Ends a stage's main once its flags are parsed."""


def parse_as_stage(module, argv: list[str], monkeypatch) -> dict[str, object]:
    """Return every flag's value as the stage's own parser sees it."""
    parsed = {}

    def parse(*arguments):
        for group in parse_arguments(*arguments):
            parsed.update(asdict(group))
        raise ParsedError

    monkeypatch.setattr("medicalgpt.arguments.parse_arguments", parse)
    with pytest.raises(ParsedError):
        module.main(argv)
    return parsed


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launchers_values_are_its_scripts_own_defaults(launch, name, monkeypatch):
    command, _ = launch(name)
    script = next(i for i, word in enumerate(command) if word.endswith(".py"))
    arguments = command[script + 1 :]
    module = importlib.import_module(command[script].removesuffix(".py"))
    launched = parse_as_stage(module, arguments, monkeypatch)
    needed = ["--model_name_or_path", "m", "--train_file_dir", "d"]
    needed += ["--reward_model_path", "r"] if name == "run_ppo.sh" else []
    own = parse_as_stage(module, needed, monkeypatch)
    flags = {argument[2:] for argument in arguments if argument.startswith("--")}
    assert len(flags) > 25
    assert {flag: launched[flag] for flag in flags - OWN_TO_A_LAUNCHER} == {
        flag: own[flag] for flag in flags - OWN_TO_A_LAUNCHER
    }


# ---- found by an independent tester ------------------------------------------------------------------------


def test_without_the_flag_the_scripts_own_accumulation_counts(set_gpus):
    """2 processes × 4 = 1 process × 8."""
    set_gpus(1)
    command, _, _ = plan(torchrun("--nproc_per_node 2 pretraining.py"), {})
    assert command[-1] == "8"


def test_a_flag_with_dashes_is_the_same_flag(set_gpus):
    set_gpus(1)
    flags = "--gradient_accumulation_steps 4 --gradient-accumulation-steps 8"
    command, _, _ = plan(torchrun(f"--nproc-per-node 2 x.py {flags}"), {})
    assert command[-1] == "16"


@pytest.mark.parametrize(
    "line",
    ["--nproc_per_node gpu x.py", "--nproc_per_node 2 x.py --gradient_accumulation_steps four", "--flag 1"],
)
def test_a_line_that_cannot_be_planned_ends_with_one_line_and_code_two(set_gpus, line, capsys):
    set_gpus(1)
    with pytest.raises(SystemExit) as stop:
        plan(torchrun(line), {})
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_process_sees_one_gpu(set_gpus):
    set_gpus(2)
    command, environment, _ = plan(torchrun("--nproc_per_node 1 x.py"), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert command[0] == "python"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_spaces_between_gpus_are_no_gpus(set_gpus):
    set_gpus(1)
    command, _, _ = plan(torchrun("--nproc_per_node 2 x.py"), {"CUDA_VISIBLE_DEVICES": "0, 1"})
    assert command[0] == "python"
