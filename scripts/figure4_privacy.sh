#!/usr/bin/env bash
# Figure 4: localization accuracy by round under differential privacy.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure4_privacy}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/densenet121 dbpedia_14/openai-community/openai-gpt"}
  PRIVACY=${PRIVACY:-"0.003:15 0.006:10 0.012:15"}
else
  PAIRS=${PAIRS:-"digits/resnet18"}
  PRIVACY=${PRIVACY:-"0.003:15 0.006:10 0.012:15"}
fi

for privacy in $PRIVACY; do # noise:norm
  run_pairs privacy noise_multiplier="${privacy%:*}" clipping_norm="${privacy#*:}" "$@"
done
$PYTHON -m tracefl.report runs="$OUT/privacy-*" out="$OUT"
