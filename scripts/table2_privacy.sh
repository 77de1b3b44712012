#!/usr/bin/env bash
# Table II: mean localization accuracy by the noise of differential privacy, from the runs of figure 4.
# SCALE, PAIRS, PRIVACY, DATA and further settings as in figure4_privacy.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-logs/figure4_privacy} PYTHON=${PYTHON:-uv run python}

bash scripts/figure4_privacy.sh "$@"
$PYTHON -m tracefl.report runs="$OUT/privacy-*" x=noise_multiplier out="$OUT"
