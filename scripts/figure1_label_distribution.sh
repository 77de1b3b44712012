#!/usr/bin/env bash
# Figure 1: how Dirichlet's alpha spreads labels over clients. Nothing is trained.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure1_label_distribution}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18"}
  ALPHAS=${ALPHAS:-0.1,0.3,0.7,1}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  ALPHAS=${ALPHAS:-0.1,0.3,1}
fi

run_pairs figure1 dirichlet_alpha="$ALPHAS" do_training=false do_provenance=false "$@"
$PYTHON -m tracefl.report data="$OUT/data/*" out="$OUT"
