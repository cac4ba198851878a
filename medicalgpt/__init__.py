"""What two or more MedicalGPT scripts need, one noun per module."""

import logging
import os
import signal
import sys
from pathlib import Path

# Before the libraries are imported: no telemetry, no notes about optional kernels.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent:
    # A script of this project is starting: until it has handlers of its own, a signal just ends it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(75))
