"""Write what is derived in manifests/ and tests/golden anew, or compare it: roles, schema of settings, installations, injected pods.

Called by ``make manifests`` (writes) and by tests (compare), so that a change of the chart is seen as a change of what users apply.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli.render.chart import CHART, as_yaml, load_chart, render  # noqa: E402
from cli.render.roles import roles_template  # noqa: E402
from cli.render.values import assigned, schema  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
PROFILES = {
    "install": ((), False),
    "install-ha": ((), True),
    "install-no-agent": (("agent.enabled=false,networkPolicies=false",), False),
    "install-cert-manager": (("certManager.enabled=true,identity.issuer.source=secret",), False),
}
"""Golden file -> (``--set``, ``--ha``)."""


def derived() -> dict[Path, str]:
    """Path -> text, of everything in manifests/ that is written from code."""
    return {
        CHART / "templates" / "rbac.yaml": roles_template(),
        CHART / "values.schema.json": json.dumps(schema(), indent=2) + "\n",
    }


def golden() -> dict[Path, str]:
    """Path -> text, of rendered installations."""
    chart = load_chart()
    whole = {"createNamespace": True}
    return {
        GOLDEN / f"{name}.yaml": as_yaml(render(chart, {**whole, **assigned(settings)}, ha=ha)) for name, (settings, ha) in PROFILES.items()
    }


def injected() -> dict[Path, str]:
    """Path -> text, of a Deployment with everything that injection looks at, injected in every way."""
    import yaml

    from injector.mark import mark
    from injector.mesh import Mesh
    from injector.patch import apply_patch, review

    meshes = {"agent": Mesh(capture="agent"), "init": Mesh(), "classic": Mesh(native_sidecar=False)}
    before = yaml.safe_load((GOLDEN / "injection-before.yaml").read_text("utf-8"))
    return {
        GOLDEN / f"injection-{name}.yaml": yaml.safe_dump(apply_patch(pod, review(pod, {}, mesh)[1]), sort_keys=False, width=140)
        for name, mesh in meshes.items()
        for pod in [mark(before)]
    }


def main() -> int:
    """Exit code 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for produce in (derived, golden, injected):  # rendered installations hold the derived roles
        for path, text in produce().items():
            if path.exists() and path.read_text("utf-8") == text:
                continue
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8")
    print("\n".join(f"{'differs' if check else 'written'}: {path}" for path in stale) or "everything is as it should be")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
