"""Asks the checks in order: a fatal one ends the run, one that settles is asked again until the time is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from cli.check.cluster import Cluster
from cli.check.model import Category, Check, Failed, Outcome, Result, Skipped
from core.k8s.errors import ApiError

_AGAIN_S = 1.0
_LOOK_S = 60.0  # one look: the API server's own bound

Tell = Callable[[Category, Check, str], None]
"""Called before a check is asked, and with the last cause while it is asked again."""


async def run_checks(
    categories: Iterable[Category], cluster: Cluster, wait_s: float, tell: Tell, done: Callable[[Result], None]
) -> list[Result]:
    """Every result, in order; ``done`` hears of each at once."""
    results: list[Result] = []
    deadline = trio.current_time() + wait_s
    for category in categories:
        for check in category.checks:
            tell(category, check, "")
            result = await _settled(category, check, cluster, deadline, tell)
            results.append(result)
            done(result)
            if result.outcome == "error" and check.severity == "fatal":
                return results
    return results


async def _settled(category: Category, check: Check, cluster: Cluster, deadline: float, tell: Tell) -> Result:
    while True:
        result = await _asked(category, check, cluster)
        may_settle = result.outcome in ("error", "warning") and check.settles and not result.final
        if not may_settle or trio.current_time() + _AGAIN_S > deadline:
            return result
        tell(category, check, result.text)
        await trio.sleep(_AGAIN_S)
        cluster.forget()


async def _asked(category: Category, check: Check, cluster: Cluster) -> Result:
    failed: Outcome = "warning" if check.severity == "warning" else "error"
    try:
        with trio.fail_after(_LOOK_S):
            remark = await check.look(cluster)
    except Skipped as why:
        return Result(category, check, "skipped", str(why))
    except Failed as error:
        return Result(category, check, failed, error.text, error.hint or check.where, error.final)
    except ApiError as error:
        return Result(category, check, failed, error.message, check.where)
    except trio.TooSlowError:
        return Result(category, check, failed, f"no answer within {_LOOK_S:g} s", check.where)
    return Result(category, check, "success", remark or "")
