#!/usr/bin/env bash
# What titan promises when the world misbehaves, tried in full (CI tries a part): a table of what was done to it, what is
# promised for then, and how often it held. Fails where it did not.
#
#   scripts/drill.sh              # everything, some 20 minutes on two cores
#   scripts/drill.sh kills        # the drills of tests/faults/kills.rs
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
held=0
TITAN_DRILL=full cargo test --release --test faults -- --nocapture "$@" > "$log" 2>&1 || held=$?
[ "$held" -eq 0 ] || cat "$log"

echo '| when | then | held |'
echo '| --- | --- | --- |'
grep '^| ' "$log" | sort | sed 's/: / | /' || true
exit "$held"
