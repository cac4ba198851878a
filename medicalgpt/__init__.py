"""What two or more MedicalGPT scripts need, one noun per module."""

import logging
import os

# Before the libraries are imported: no telemetry, no notes about optional kernels.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
