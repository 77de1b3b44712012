#!/usr/bin/env bash
# Table III: localization accuracy by the number of clients.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/table3_clients}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"dbpedia_14/openai-community/openai-gpt"}
  COUNTS=${COUNTS:-200,400,600,800,1000}
  PER_ROUND=${PER_ROUND:-10}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  COUNTS=${COUNTS:-5,10,20}
  PER_ROUND=${PER_ROUND:-5}
fi

run_pairs table3 num_clients="$COUNTS" clients_per_round="$PER_ROUND" "$@"
$PYTHON -m tracefl.report runs="$OUT/table3-*" x=num_clients out="$OUT"
