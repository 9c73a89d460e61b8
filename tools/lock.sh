#!/usr/bin/env bash
# Write requirements.lock anew: every extra, CPython 3.11 to 3.14, all platforms, with hashes and without addresses.
# Pins that still fit are kept; `tools/lock.sh --upgrade` takes the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .cache/lock/bin/uv ] || { python3 -m venv .cache/lock && .cache/lock/bin/pip install --quiet uv; }
.cache/lock/bin/uv pip compile setup.cfg --extra control --extra cli --extra test --extra dev --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock "$@"
# what the image holds: the same pins, without tests and tools
.cache/lock/bin/uv pip compile setup.cfg --extra control --extra cli --universal --python-version 3.11 --constraint requirements.lock \
    --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-image.lock
if grep -n "://" requirements.lock requirements-image.lock; then
    echo "lock files must hold no addresses" >&2
    exit 1
fi
