#!/usr/bin/env bash
# The whole study; with --small about a tenth of it. It may be stopped at any time: given again, the
# same command goes on. MODEL and DATA are local copies of what is fetched otherwise (see data.py), JOBS the runs at a time.
set -euo pipefail
here=$(dirname "$0")
OUTPUT=${OUTPUT:-outputs/smollm2-135m}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
share=1
if [[ " $* " == *" --small "* ]]; then
    OUTPUT=$OUTPUT-small share=0.15
fi
common=(--output_dir "$OUTPUT" --model "$MODEL" --jobs "${JOBS:-1}" "$@")

if [[ ! -f $OUTPUT/data/counts.json ]]; then
    python "$here/data.py" --output_dir "$OUTPUT" --model "$MODEL" --share "$share" ${DATA:+--data "$DATA"}
fi
python "$here/study.py" models "${common[@]}"
python "$here/report.py" models "${common[@]}"
python "$here/study.py" policies "${common[@]}"
python "$here/report.py" policies "${common[@]}"
python "$here/tables.py" "$OUTPUT"/report/{models,policies}.json --pictures "$OUTPUT/report"
