#!/usr/bin/env bash
# Table I: naming a faulty client, TraceFL and FedDebug, by Dirichlet's alpha.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/table1_faults}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18 cifar10/densenet121 dbpedia_14/google-bert/bert-base-cased"}
  ALPHAS=${ALPHAS:-0.3,0.7,1}
  FAULTY=${FAULTY:-[0]}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  ALPHAS=${ALPHAS:-0.3,0.7,1}
  FAULTY=${FAULTY:-[0]}
fi

run_pairs table1 dirichlet_alpha="$ALPHAS" num_clients=10 faulty_clients_ids="$FAULTY" 'label2flip={1:0,2:0,3:0,4:0,5:0,6:0,7:0,8:0,9:0,10:0,11:0,12:0,13:0}' "$@"
$PYTHON -m tracefl.report runs="$OUT/table1-*" x=dirichlet_alpha out="$OUT"
