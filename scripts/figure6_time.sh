#!/usr/bin/env bash
# Figure 6: seconds per localization of TraceFL and FedDebug, with a faulty client.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure6_time}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18 mnist/densenet121 cifar10/resnet18 cifar10/densenet121"}
  ALPHAS=${ALPHAS:-0.7}
  FAULTY=${FAULTY:-[0]}
else
  PAIRS=${PAIRS:-"digits/resnet18 digits/densenet121"}
  ALPHAS=${ALPHAS:-0.7}
  FAULTY=${FAULTY:-[0]}
fi

run_pairs figure6 dirichlet_alpha="$ALPHAS" num_clients=10 faulty_clients_ids="$FAULTY" 'label2flip={1:0,2:0,3:0,4:0,5:0,6:0,7:0,8:0,9:0,10:0,11:0,12:0,13:0}' "$@"
$PYTHON -m tracefl.report runs="$OUT/figure6-*" out="$OUT"
