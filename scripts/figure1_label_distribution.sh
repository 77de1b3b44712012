#!/usr/bin/env bash
# Figure 1: how Dirichlet's alpha spreads labels over clients. Nothing is trained.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-small} OUT=${OUT:-logs/figure1_label_distribution} PYTHON=${PYTHON:-uv run python}
DATA=${DATA:-} # a folder with copies of the datasets in the hub's layout, instead of the hub
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18"}
  ALPHAS=${ALPHAS:-0.1,0.3,0.7,1}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  ALPHAS=${ALPHAS:-0.1,0.3,1}
fi

for pair in $PAIRS; do # dataset/model
  dataset=${pair%%/*} model=${pair#*/}
  $PYTHON -m tracefl.main --multirun +scale="$SCALE" exp_key=figure1 storage.dir="$OUT" \
    dataset.name="$dataset" ${DATA:+dataset.path="$DATA/$dataset"} model.name="$model" dirichlet_alpha="$ALPHAS" do_training=false do_provenance=false \
    "$@"
done
$PYTHON -m tracefl.report data="$OUT/data/*" out="$OUT"
