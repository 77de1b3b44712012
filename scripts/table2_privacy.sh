#!/usr/bin/env bash
# Table II: mean localization accuracy by the noise of differential privacy.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-small} OUT=${OUT:-logs/figure4_privacy} PYTHON=${PYTHON:-uv run python}
DATA=${DATA:-} # a folder with copies of the datasets in the hub's layout, instead of the hub
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/densenet121 dbpedia_14/openai-community/openai-gpt"}
  PRIVACY=${PRIVACY:-"0.003:15 0.006:10 0.012:15"}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  PRIVACY=${PRIVACY:-"0.003:15 0.006:10 0.012:15"}
fi

for privacy in $PRIVACY; do # noise:norm
  for pair in $PAIRS; do # dataset/model
    dataset=${pair%%/*} model=${pair#*/}
    $PYTHON -m tracefl.main --multirun +scale="$SCALE" exp_key=privacy storage.dir="$OUT" \
      dataset.name="$dataset" ${DATA:+dataset.path="$DATA/$dataset"} model.name="$model" \
      noise_multiplier="${privacy%:*}" clipping_norm="${privacy#*:}" "$@"
  done
done
$PYTHON -m tracefl.report runs="$OUT/privacy-*" x=noise_multiplier out="$OUT"
