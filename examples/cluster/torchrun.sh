#!/usr/bin/env bash
# Several machines without a scheduler: run this on each of them, with the same first machine and its number in turn.
#   examples/cluster/torchrun.sh FIRST_MACHINE NUMBER_OF_MACHINES THIS_MACHINES_NUMBER CONFIG [section.key=value ...]
# The engine is the config's (engine.kind). Overrides are the training's: what decides the reference (model, data) stands in the config.
# The config, the data, the run folder and the reference store must lie where every machine sees them.
set -euo pipefail
first=${1:?first machine} machines=${2:?number of machines} number=${3:?number of this machine, from 0} config=${4:?config}
shift 4
launch=(torchrun --nnodes "$machines" --node-rank "$number" --nproc-per-node gpu
    --master-addr "$first" --master-port 29400)

"${launch[@]}" -m lorafocal cache-reference "$config"    # leave it out where reference.kind is not cached (orpo, simpo, sft)
"${launch[@]}" -m lorafocal train "$config" "$@"
