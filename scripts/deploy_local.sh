#!/usr/bin/env bash
# A federation as it is deployed, on this machine alone: a SuperLink and NODES SuperNodes, with TLS and node keys, on loopback.
# Makes certificates and keys, prepares the data, hands every node its part (which the server then no longer has), starts it all, says
# how to run the app, and stays until Ctrl-C. Settings follow as key=value, as after python -m tracefl.main. See docs/deployment.md.
set -euo pipefail
cd "$(dirname "$0")/.."
NODES=${NODES:-3} PORT=${PORT:-8443} NODE_PORT=${NODE_PORT:-9094} PYTHON=${PYTHON:-uv run python}
OUT=$(realpath -m "${OUT:-logs/deployment}") # all that it makes; node k's own folder is $OUT/nodes/k
BIN=$($PYTHON -c 'import os, sys; print(os.path.dirname(sys.executable))')
export PATH="$BIN:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 OMP_WAIT_POLICY=PASSIVE
TLS=$OUT/tls STARTED=()
mkdir -p "$TLS" "$OUT/nodes" "$OUT/server"
chmod 700 "$OUT" # private keys

stop() { # what this script started, and waits until it has ended
  trap - EXIT INT TERM
  kill "${STARTED[@]}" 2>/dev/null || true
  wait || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "error: $*" >&2
  exit 1
}

certificates() { # an authority, and a certificate of it for loopback
  openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj "/CN=TraceFL local authority" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$TLS/ca.key" -out "$TLS/ca.crt"
  openssl req -newkey rsa:3072 -nodes -subj "/CN=localhost" -keyout "$TLS/server.key" -out "$TLS/server.csr"
  printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\n' >"$TLS/san"
  openssl x509 -req -in "$TLS/server.csr" -CA "$TLS/ca.crt" -CAkey "$TLS/ca.key" -CAcreateserial -days 365 \
    -extfile "$TLS/san" -out "$TLS/server.crt"
}
[ -f "$TLS/server.crt" ] || certificates 2>"$OUT/openssl.log" || fail "openssl failed: see $OUT/openssl.log"

for ((k = 0; k < NODES; k++)); do
  mkdir -p "$OUT/nodes/$k"
  [ -f "$OUT/nodes/$k/key" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "client $k" -f "$OUT/nodes/$k/key"
done

SETTINGS=(num_clients="$NODES" clients_per_round="$NODES" "$@" storage.dir="$OUT/server")
python -m tracefl.main "${SETTINGS[@]}" do_training=false do_provenance=false >"$OUT/prepare.log" || fail "the data could not be prepared"
DATA=$(sed -n 's/ is prepared; .*//p' "$OUT/prepare.log")
NAME=$(basename "$DATA") # a node keeps a file for each preparation
if [ -d "$DATA/clients" ]; then
  for ((k = 0; k < NODES; k++)); do mv "$DATA/clients/$k.safetensors" "$OUT/nodes/$k/$NAME.safetensors"; done
  rmdir "$DATA/clients"
fi

export FLWR_HOME="$OUT/server/flwr"
mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' "$PORT" "$TLS/ca.crt" >"$FLWR_HOME/config.toml"
SSL=(--ssl-ca-certfile "$TLS/ca.crt" --ssl-certfile "$TLS/server.crt" --ssl-keyfile "$TLS/server.key")
! (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null || fail "port $PORT is taken: set PORT to another"
flower-superlink "${SSL[@]}" --enable-supernode-auth --host 127.0.0.1 --port "$PORT" \
  --disable-runtime-dependency-installation >"$OUT/server/superlink.log" 2>&1 &
STARTED+=($!)
for ((i = 0; i < 120; i++)); do
  ! (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null || break
  kill -0 "${STARTED[0]}" 2>/dev/null || fail "the SuperLink ended: see $OUT/server/superlink.log"
  sleep 0.5
done

for ((k = 0; k < NODES; k++)); do
  flwr supernode register "$OUT/nodes/$k/key.pub" lab >"$OUT/nodes/$k/register.log" 2>&1 ||
    fail "node $k could not be registered: see $OUT/nodes/$k/register.log"
  FLWR_HOME="$OUT/nodes/$k/flwr" flower-supernode --superlink "127.0.0.1:$PORT" --root-certificates "$TLS/ca.crt" "${SSL[@]}" \
    --auth-supernode-private-key "$OUT/nodes/$k/key" --host 127.0.0.1 --port "$((NODE_PORT + k))" \
    --node-config "partition-id=$k data-path=\"$OUT/nodes/$k/$NAME.safetensors\"" >"$OUT/nodes/$k/supernode.log" 2>&1 &
  STARTED+=($!)
done

printf -v TEXT '%q ' "${SETTINGS[@]}"
cat >"$OUT/run.sh" <<END
#!/usr/bin/env bash
# Runs the app on this federation, or goes on with its run; further settings follow as key=value.
export FLWR_HOME='$FLWR_HOME' FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
more=\$([ \$# = 0 ] || printf '%q ' "\$@")
cat >'$OUT/server/settings.toml' <<TOML
settings = '''$TEXT\$more'''
TOML
exec '$BIN/flwr' run '$PWD/app' lab --stream -c '$OUT/server/settings.toml'
END
chmod +x "$OUT/run.sh"
echo "ready: SuperLink 127.0.0.1:$PORT, $NODES SuperNodes; run the app by $OUT/run.sh"
wait -n "${STARTED[@]}" || true
fail "a process ended: see $OUT/server/superlink.log and $OUT/nodes/*/supernode.log"
