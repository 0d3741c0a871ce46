#!/bin/sh
# The first look at a card from an unpacked repository: fetch the wheels here (`prepare`), or install them and look (`look`).
#   sh benchmarks/gpu_first_look.sh prepare    on a machine that reaches a package index; writes .wheels/
#   sh benchmarks/gpu_first_look.sh look       on the machine with the card, which needs torch and transformers
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
case "${1:-}" in
prepare)
	exec "$PYTHON" -m benchmarks.gpu_first_look --prepare .wheels
	;;
look)
	shift
	"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .site .wheels/*.whl
	PYTHONPATH=".site:$PWD" exec "$PYTHON" -m benchmarks.gpu_first_look "$@"
	;;
*)
	echo "usage: sh benchmarks/gpu_first_look.sh prepare|look" >&2
	exit 2
	;;
esac
