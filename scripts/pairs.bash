# What the scripts share: their defaults, and one sweep for each dataset/model of PAIRS.
SCALE=${SCALE:-small} PYTHON=${PYTHON:-uv run python}
DATA=${DATA:-} # a folder with copies of the datasets in the hub's layout, instead of the hub

run_pairs() { # EXP_KEY [key=value ...]
  local key=$1 pair
  shift
  for pair in $PAIRS; do
    $PYTHON -m tracefl.main --multirun +scale="$SCALE" exp_key="$key" storage.dir="$OUT" \
      dataset.name="${pair%%/*}" ${DATA:+dataset.path="$DATA/${pair%%/*}"} model.name="${pair#*/}" "$@"
  done
}
