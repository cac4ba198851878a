"""The few kinds of refusal, their exit codes, and how a script ends.

0 done · 1 fault in the run · 2 flag or path · 3 data · 4 model, adapter or checkpoint
75 stopped by a signal after a whole checkpoint, resumable · 130 second Ctrl-C
"""

import importlib.util
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TextIO

logger = logging.getLogger("medicalgpt")

INTERRUPTED = 130  # exit code of a tool, and of a stage at the second Ctrl-C


class MedicalGPTError(Exception):
    """A refusal to act on: one line with what is wrong, the value seen, what is allowed, the mend."""

    exit_code = 1


class RunError(MedicalGPTError):
    """A fault in the run: full disk, non-finite loss, lost rank."""

    exit_code = 1


class ConfigError(MedicalGPTError):
    """A wrong flag or path. A hub that cannot be reached is a path."""

    exit_code = 2


class DataError(MedicalGPTError):
    """A wrong data file or row: `file:line: field: what; mend`."""

    exit_code = 3


class ModelError(MedicalGPTError):
    """A wrong model, adapter or checkpoint."""

    exit_code = 4


class StoppedError(MedicalGPTError):
    """Stopped by a signal after a whole checkpoint; the same command continues."""

    exit_code = 75


def require_packages(*names: str) -> None:
    """End with one line where a package of requirements.txt is not installed in this Python.

    Called before the packages are imported, whose absence would be a traceback otherwise.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"error: {', '.join(missing)} not installed in {sys.executable}; run "
            "source .venv/bin/activate, or pip install -r requirements.txt\n"
        )
        sys.exit(ConfigError.exit_code)


def is_main_rank() -> bool:
    """True on the process that speaks for the run: rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


class SurvivingStream:
    """A stream that outlives its reader: Ctrl-C also ends the `tee` behind a run that still has to save."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        """Give everything else of the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or throw away what nobody reads."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            return self.let_go(len(text))

    def flush(self) -> None:
        """Flush, or throw away what nobody reads."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.let_go(0)

    def let_go(self, written: int) -> int:
        """Send everything from here on to nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return written


def start_logging() -> None:
    """Log to stderr (under a launcher: to the launcher's), rank 0 from INFO, the other ranks errors only."""
    for stream in (sys.stdin, sys.stdout):
        if stream is not None:  # closed by whoever started the process
            stream.reconfigure(encoding="utf-8", errors="replace")
    launchers_stderr = os.environ.get("MEDICALGPT_STDERR")
    if launchers_stderr:
        os.dup2(os.open(launchers_stderr, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = SurvivingStream(sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries about each other
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    logger.setLevel(logging.INFO if is_main_rank() else logging.ERROR)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, with its type when it is not ours."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, MedicalGPTError) else f"{type(error).__name__}: {text}"


def run_script(main: Callable[[list[str]], None], *, resumable: bool = False) -> None:
    """Run `main(argv)` and exit with the code of `errors`: one line on stderr per refusal.

    Args:
        resumable: the same command continues what was stopped (a stage).

    `--debug` anywhere on the command line also prints the traceback. Under torchrun a refusal that every
    rank meets is printed by rank 0; a fault of one rank names it. When MEDICALGPT_EXIT_FILE is set (by the
    launcher), the exit code is written there, because torchrun turns every worker's code into 1.
    """
    argv = [arg for arg in sys.argv[1:] if arg != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    start_logging()
    # A stage that has not begun its first step has nothing to save and is continued by the same command.
    stopped = StoppedError.exit_code if resumable else INTERRUPTED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopped))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = stopped
        report(RunError("interrupted; nothing was saved"), debug)
    except BrokenPipeError:  # whoever read the standard output has gone
        sys.stdout, code = None, RunError.exit_code
    except Exception as error:
        code = error.exit_code if isinstance(error, MedicalGPTError) else 1
        report(error, debug)
    record_exit_code(code)
    sys.stderr.flush()
    # Not sys.exit: a rank that was refused must not wait in the destructors of process groups and loader
    # threads.
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(code)


def report(error: BaseException, debug: bool) -> None:
    """Print `error: …` as one line, from the rank that has something to say."""
    everyone_meets_it = isinstance(error, ConfigError | DataError | ModelError | StoppedError)
    if everyone_meets_it and not is_main_rank():
        return
    rank = "" if everyone_meets_it or "RANK" not in os.environ else f"rank {os.environ['RANK']}: "
    if debug:
        traceback.print_exception(error)
    hint = "" if isinstance(error, MedicalGPTError) or debug else " (--debug shows where)"
    word = "stopped" if isinstance(error, StoppedError) else "error"
    sys.stderr.write(f"{word}: {rank}{first_line(error)}{hint}\n")


def record_exit_code(code: int) -> None:
    """Tell the launcher this process's exit code; the first non-zero one of a run counts."""
    path = os.environ.get("MEDICALGPT_EXIT_FILE")
    if path and code and not os.path.getsize(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(code))
