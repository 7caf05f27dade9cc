#!/bin/bash
# The paper's ablation (its Table 4): 2k = 2, 4, 6, 8, with and without scale gate and L2 normalisation. Sixteen runs of
# gpm.yaml, one after the other; those that are done are passed over, and one that was stopped goes on.
#
#     bash recipes/gemma-2b-it/ablation.sh
#     LAUNCH=echo bash recipes/gemma-2b-it/ablation.sh    # only tells the commands
set -euo pipefail

LAUNCH=${LAUNCH:-accelerate launch --config_file recipes/accelerate_configs/zero3.yaml}

for dim in 2 4 6 8; do
    for gate in true false; do
        for normalize in true false; do
            output_dir=outputs/gemma-2b-it-ablation/dim$dim-gate_$gate-l2_$normalize
            if [ -e "$output_dir/config.json" ]; then
                continue
            fi
            $LAUNCH -m gpm_trl.cli.gpm --config recipes/gemma-2b-it/gpm.yaml --output_dir "$output_dir" \
                --embedding_dim "$dim" --use_scale_gate "$gate" --normalize_embeddings "$normalize" \
                --resume_from_checkpoint true
        done
    done
done
