#!/usr/bin/env bash
# Figure 2: localization accuracy on correct predictions by round, for models and datasets.
# Small by default: minutes on two cores, offline. SCALE=paper: the paper's values, from the hub, on a GPU; tracefl/conf/scale
# holds what all scripts share. Further settings may follow as key=value. Run again, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-logs/figure2_accuracy}
source scripts/pairs.bash
if [ "$SCALE" = paper ]; then
  PAIRS=${PAIRS:-"mnist/resnet18 mnist/densenet121 cifar10/resnet18 cifar10/densenet121 pathmnist/resnet18 pathmnist/densenet121 organamnist/resnet18 organamnist/densenet121 dbpedia_14/google-bert/bert-base-cased dbpedia_14/openai-community/openai-gpt yahoo_answers_topics/google-bert/bert-base-cased yahoo_answers_topics/openai-community/openai-gpt"}
else
  PAIRS=${PAIRS:-"digits/resnet18 digits/densenet121"}
fi

run_pairs figure2 "$@"
$PYTHON -m tracefl.report runs="$OUT/figure2-*" out="$OUT"
