"""What `torchrun` means in the launchers: as many processes as there are GPUs, the same effective batch.

    CUDA_VISIBLE_DEVICES=0,1 python -m medicalgpt.launch --nproc_per_node 2 pretraining.py --flag value …

With fewer GPUs than the line names, the number of processes goes down and `--gradient_accumulation_steps`
goes up, and one line says so; without a GPU it is one process. The exit code is the stage's own (torchrun
alone makes every code 1), and the last line of a failure says FAILED. Standard library only.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ACCUMULATION = "--gradient_accumulation_steps"
DEFAULT_ACCUMULATION = 4  # of every stage
STOPPED = 75


def split_command(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split a torchrun command line into (its options, the script, the script's arguments)."""
    place = next((i for i, arg in enumerate(argv) if arg.endswith(".py")), None)
    if place is None:
        sys.stderr.write("error: no script on the line; expected torchrun --nproc_per_node N SCRIPT.py …\n")
        sys.exit(2)
    return list(argv[:place]), argv[place], list(argv[place + 1 :])


def last_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of the last `name VALUE` or `name=VALUE`, as argparse would take it."""
    value = None
    for index, arg in enumerate(arguments):
        flag, equals, inline = arg.partition("=")
        if flag.replace("-", "_") == name.replace("-", "_"):
            value = inline if equals else arguments[index + 1] if index + 1 < len(arguments) else None
    return value


def number(arguments: Sequence[str], name: str, default: int) -> int:
    """Return the value of a flag as a number of 1 or more; anything else ends the launch with one line."""
    value = last_value(arguments, name)
    if value is None:
        return default
    if not value.isdecimal() or int(value) < 1:
        sys.stderr.write(f"error: {name} {value} is not allowed; expected a number of 1 or more\n")
        sys.exit(2)
    return int(value)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names and that exist (all, when it names none)."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(count)]
    gpus = [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    return [gpu for gpu in gpus if not gpu.isdecimal() or int(gpu) < count]


def fit_processes(named: int, available: int, accumulation: int) -> tuple[int, int]:
    """Return (processes, accumulation): as many processes as there are GPUs, with the same product.

    The product of both must stay, so a number of processes that does not divide it is passed over.
    """
    product = named * accumulation
    processes = next(n for n in range(max(1, min(named, available)), 0, -1) if product % n == 0)
    return processes, product // processes


def plan(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str], str | None]:
    """Return (command, environment, what to say) for a torchrun command line."""
    options, script, arguments = split_command(argv)
    environment = dict(environment)
    if any(option.startswith(("--nnodes", "--rdzv", "--master")) for option in options):
        return ["torchrun", *options, script, *arguments], environment, None
    named = number(options, "--nproc_per_node", 1)
    accumulation = number(arguments, ACCUMULATION, DEFAULT_ACCUMULATION)
    gpus = visible_gpus(environment)
    processes, new_accumulation = fit_processes(named, len(gpus), accumulation)
    message = None
    if processes < named:
        arguments += [ACCUMULATION, str(new_accumulation)]
        message = (
            f"launch: {len(gpus)} of {named} GPUs are there, so processes={processes} with "
            f"{ACCUMULATION} {new_accumulation} instead of {accumulation} (same effective batch)"
        )
    if processes < named or processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:processes])
    if processes == 1:
        return ["python", script, *arguments], environment, message
    return (
        ["torchrun", "--standalone", "--nproc_per_node", str(processes), script, *arguments],
        environment,
        message,
    )


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command, pass a termination request on to it, and return the stage's own exit code.

    torchrun answers the end of a rank with pages of its own. The ranks therefore write to this process's
    stderr, and what torchrun says is kept back unless no rank has said why it ended.
    """
    with (
        tempfile.NamedTemporaryFile("r", prefix="medicalgpt-exit-", encoding="utf-8") as exit_file,
        tempfile.TemporaryFile() as kept_back,
    ):
        environment["MEDICALGPT_EXIT_FILE"] = exit_file.name
        own_stderr = f"/proc/{os.getpid()}/fd/2"
        quiet = command[0] == "torchrun" and os.path.exists(own_stderr)
        if quiet:
            environment["MEDICALGPT_STDERR"] = own_stderr
        child = subprocess.Popen(command, env=environment, stderr=kept_back if quiet else None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the child as well
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        code = child.wait()
        written = exit_file.read().strip()
        if code and not written:
            kept_back.seek(0)
            sys.stderr.write(kept_back.read().decode(errors="replace"))
    return int(written) if code and written else 128 - code if code < 0 else code


def main() -> None:
    """Plan, say, run, and exit with the stage's code."""
    command, environment, message = plan(sys.argv[1:], os.environ)
    if message:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    code = run(command, environment)
    if code == STOPPED:
        sys.stderr.write(f"STOPPED with exit code {code}: the same command continues\n")
    elif code:
        sys.stderr.write(f"FAILED with exit code {code}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
