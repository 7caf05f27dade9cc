"""
The `gpm-trl` command: one module for each of its commands. Its `main` returns the exit code: 0, or 2 with one line on
stderr for arguments, files or data that it cannot use.
"""

import logging
import os
import warnings

import torch

if not torch.accelerator.is_available():  # DeepSpeed, which accelerate imports, would say so
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns of a kernel that CPUs lack
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)  # the name that TRL 1.16 uses
