#!/usr/bin/env bash
# Figure 5: localization accuracy over many rounds with many clients.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure5_many_rounds}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/densenet121"}
  CLIENTS=${CLIENTS:-400}
  ROUNDS=${ROUNDS:-80}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  CLIENTS=${CLIENTS:-16}
  ROUNDS=${ROUNDS:-10}
fi

run_pairs figure5 num_clients="$CLIENTS" num_rounds="$ROUNDS" "$@"
$PYTHON -m tracefl.report runs="$OUT/figure5-*" out="$OUT"
