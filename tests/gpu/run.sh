#!/bin/bash
# Checks and measures on one GPU in under nine minutes, without a network: what is run says check.py.
#
#     bash tests/gpu/run.sh                  # needs CUDA; writes gpu.json and gpu.log to $OUT, or to the current folder
#     bash tests/gpu/run.sh --tiny           # every line of it on the CPU, with tiny sizes
#     PYTHON=python3.12 bash tests/gpu/run.sh --minutes 5 --out results/gpu.json
#
# It takes a copy of the repository and a Python with torch, pytest, numpy and scipy; neither need be installed into.
# What else is missing there comes as wheels, in the folder .whl of the repository. Where there is a network:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -d .whl \
#         transformers trl peft accelerate datasets dill multiprocess xxhash
#
# and whatever these want in another version than is there (tokenizers, huggingface-hub, safetensors, pyarrow).
set -euo pipefail
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site-packages # by this name, dill knows what is installed, and datasets what not to hash
mkdir "$site"
shopt -s nullglob
wheels=("$tree"/.whl/*.whl)
if ((${#wheels[@]})); then
    "$python" -m pip install --quiet --root-user-action=ignore --no-index --no-deps --no-compile --target "$site" "${wheels[@]}"
fi
# The package reads its version off its distribution: all that is needed of one.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$tree/pyproject.toml")
mkdir "$site/gpm_trl-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: gpm-trl\nVersion: %s\n' "$version" >"$site/gpm_trl-$version.dist-info/METADATA"
export PYTHONPATH="$site:$tree${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" "$tree/tests/gpu/check.py" "$@"
