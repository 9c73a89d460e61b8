"""Giving back the pages of files that only a start or a handshake needed."""

from __future__ import annotations

import subprocess
import sys

from ebpf.resident import untouched_file_mappings

SMAPS = """\
1000-3000 r-xp 00001000 fe:00 77 /usr/lib/libcrypto.so.3
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00003000 fe:00 77 /usr/lib/with relocations.so
Rss:                   4 kB
Anonymous:             4 kB
4000-5000 rw-p 00004000 fe:00 77 /usr/lib/libcrypto.so.3
Anonymous:             0 kB
5000-6000 rw-p 00000000 00:00 0 [heap]
Anonymous:             0 kB
6000-7000 r-xp 00000000 00:00 0
Anonymous:             0 kB
7000-8000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
8000-a000 r--p 00000000 fe:00 78 /usr/lib/locale/C.utf8/LC_CTYPE
Anonymous:             0 kB
"""

DROPS = """
import ssl
from ebpf.resident import drop_file_pages
def of_files():
    with open("/proc/self/smaps_rollup") as file:
        sizes = {line.split()[0]: int(line.split()[1]) for line in file.readlines()[1:]}
    return sizes["Rss:"] - sizes["Anonymous:"], sizes["Anonymous:"]
ssl.create_default_context()
before, own = of_files()
drop_file_pages()
after, own_after = of_files()
ssl.create_default_context()
print(before, after, own, own_after)
"""


def test_only_mappings_that_are_still_the_files_are_dropped() -> None:
    assert list(untouched_file_mappings(SMAPS.splitlines(keepends=True))) == [(0x1000, 0x2000), (0x8000, 0x2000)]


def test_a_process_goes_on_with_fewer_pages_of_files_and_all_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", DROPS], capture_output=True, text=True, check=True)
    before, after, own, own_after = map(int, done.stdout.split())
    assert after < before / 2
    assert own_after > own * 0.9
