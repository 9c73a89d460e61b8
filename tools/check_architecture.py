"""Keep the list of modules in ARCHITECTURE.md equal to the tree: names, ● for promised purity, first sentence of each docstring.

The list stands between two comments; ``--write`` replaces it. Also refuses a module without a docstring, a promise of purity in setup.cfg
for a module that is not there, and a file named elsewhere on the page that is not there. Called by ``make lint`` (to compare) and
``make architecture`` (to write).
"""

from __future__ import annotations

import argparse
import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- modules: written by `make architecture` -->\n", "<!-- end of modules -->\n"


def first_sentence(docstring: str) -> str:
    """The first paragraph of a docstring on one line, up to its first full stop."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence if stop else paragraph.removesuffix(".")


def module_name(path: Path) -> str:
    """``proxy/protocol/__init__.py`` is ``proxy.protocol``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def settings() -> tuple[list[str], set[str]]:
    """Our packages, and the modules promised pure, both from setup.cfg."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    roots = config["importlinter"]["root_packages"].split()
    return roots, set(config["importlinter:contract:pure"]["source_modules"].split())


def promised(module: str, pure: set[str]) -> bool:
    """A promise for a package holds for everything in it."""
    parts = module.split(".")
    return any(".".join(parts[:count]) in pure for count in range(1, len(parts) + 1))


def listing() -> tuple[list[str], list[str]]:
    """The lines of the list, and what is wrong with the tree itself."""
    roots, pure = settings()
    lines: list[str] = []
    wrong: list[str] = []
    names: set[str] = set()
    for root in roots:
        for path in sorted((ROOT / root).rglob("*.py"), key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name)):
            name = module_name(path)
            names.add(name)
            relative = path.relative_to(ROOT).as_posix()
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if not docstring:
                wrong.append(f"{relative}: has no docstring; say what it decides or moves, what it must not do, who calls it")
                continue
            mark = " ●" if promised(name, pure) else ""
            if path.name == "__init__.py":
                heading = "###" if path.parent.parent == ROOT else "####"
                lines += ["", f"{heading} {path.parent.relative_to(ROOT).as_posix()}/{mark}", "", first_sentence(docstring) + ".", ""]
            else:
                lines.append(f"- `{relative}`{mark}: {first_sentence(docstring)}.")
    wrong += [f"setup.cfg promises that {name} is pure, but there is no such module" for name in sorted(pure - names)]
    return [*lines, ""], wrong


def missing_files(page: str) -> list[str]:
    """What is wrong with the files that the page names in code quotes, by their path or its end."""
    present = [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("*/**/*.py")]
    named = sorted(set(re.findall(r"`([\w/]+\.py)`", page)))
    return [f"{PAGE.name}: there is no {name}" for name in named if not any(path.endswith(f"/{name}") for path in present)]


def main() -> int:
    """Exit code 0 when page and tree agree."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--write", action="store_true", help="replace the list on the page")
    write = arguments.parse_args().write
    lines, wrong = listing()
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    present, end, after = rest.partition(END)
    if not begin or not end:
        wrong.append(f"{PAGE.name}: the comments around the list of modules are missing")
    wrong += missing_files(before + after)
    wanted = "\n".join(lines) + "\n"
    if write and begin and end:
        PAGE.write_text(before + begin + wanted + end + after, encoding="utf-8")
    elif present != wanted:
        stale = sorted(set(wanted.splitlines()) ^ set(present.splitlines()))
        wrong += [f"{PAGE.name}: `make architecture` would change: {line}" for line in stale]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
