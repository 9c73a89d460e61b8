"""``python -m ebpf.redirect_self``: the init container that leads a pod's connections through its sidecar where there is no agent.

Loads the ruleset of `ebpf.redirect` with nft, needs NET_ADMIN in the pod's own network namespace and nothing else, and ends. It runs
before every other container, so that nothing goes around the sidecar: if it fails, the pod does not start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from ebpf.redirect import Range, capture


def main(arguments: list[str]) -> int:
    """Exit codes: 0 captured, 1 the kernel or nft refused, 2 usage."""
    parser = argparse.ArgumentParser(prog="python -m ebpf.redirect_self", allow_abbrev=False)
    parser.add_argument("--skip-inbound", type=_ranges, default=(), metavar="PORTS", help="such as 25,8000-8010")
    parser.add_argument("--skip-outbound", type=_ranges, default=(), metavar="PORTS")
    parser.add_argument("--print", action="store_true", help="print the ruleset instead of loading it")
    asked = parser.parse_args(arguments)
    ruleset = capture(asked.skip_inbound, asked.skip_outbound)
    if asked.print:
        print(ruleset, end="")
        return 0
    try:
        done = subprocess.run(["nft", "-f", "-"], input=ruleset, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"pillion-capture: nft cannot be run: {error}; it is part of the image", file=sys.stderr)
        return 1
    if done.returncode:
        said = " ".join(done.stderr.split())[:500] or f"exit code {done.returncode}"
        print(f"pillion-capture: nft refused the ruleset: {said}", file=sys.stderr)
        print("pillion-capture: it needs NET_ADMIN and a kernel with nf_tables NAT (nft_redir)", file=sys.stderr)
        return 1
    print("pillion-capture: in place")
    return 0


def _ranges(text: str) -> list[Range]:
    found = []
    for entry in filter(None, text.split(",")):
        first, _, last = entry.partition("-")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= 65535:
            raise ValueError(entry)
        found.append((low, high))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
