#!/usr/bin/env bash
# Figure 3: localization accuracy by the skew of the data (Dirichlet's alpha).
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure3_alpha}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18 cifar10/densenet121 dbpedia_14/google-bert/bert-base-cased"}
  ALPHAS=${ALPHAS:-0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  ALPHAS=${ALPHAS:-0.1,0.3,1}
fi

run_pairs figure3 dirichlet_alpha="$ALPHAS" "$@"
$PYTHON -m tracefl.report runs="$OUT/figure3-*" x=dirichlet_alpha out="$OUT"
