"""A Hugging Face Space: the page of `gpm-trl app`, for the model or the two models that the variable MODEL names."""

import os
import sys

from gpm_trl.cli.app import main

MODEL = os.environ.get("MODEL", "general-preference/GPM-Gemma-2B")  # the smallest that its authors have released

if __name__ == "__main__":
    sys.exit(main(["--model", *MODEL.split(), "--dtype", "bfloat16", "--host", "0.0.0.0"]))
