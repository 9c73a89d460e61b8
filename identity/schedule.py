"""When to renew a certificate and when to try again after a failure. Pure: time and chance are arguments."""

from __future__ import annotations

RENEW_AT = 0.7  # of the life that is left, as Linkerd
JITTER = 0.1  # of the life: spreads renewals of pods that started together
_RENEW_MIN_S = 10.0  # Linkerd's lower clamp; gives way where a leaf lives shorter than that allows
RETRY_FIRST_S = 0.25
RETRY_CAP_S = 30.0


def renew_after_s(now: float, not_after: float, chance: float) -> float:
    """Seconds until renewal: 70 % of the remaining life, up to a tenth of it earlier.

    chance: uniform in [0, 1). Earlier, never later: the rest of the life is what an outage of the identity service may last.
    """
    left = max(0.0, not_after - now)
    return max(left * (RENEW_AT - JITTER * chance), min(_RENEW_MIN_S, left / 2))


def retry_after_s(failures: int, left_s: float, chance: float) -> float:
    """Seconds before try number ``failures + 1``: doubling from 0.25 s up to 30 s, each shortened by up to a half.

    left_s: remaining life of the certificate; short-lived ones are retried more often, at least twenty times in what is left.
    """
    cap = min(RETRY_CAP_S, max(1.0, left_s / 20)) if left_s > 0 else RETRY_CAP_S / 3
    return min(cap, RETRY_FIRST_S * 2.0 ** min(failures - 1, 16)) * (1 - chance / 2)


def follow_after_s(left_s: float, chance: float) -> float:
    """Seconds before renewing because the issuer changed: soon, but not every workload of a mesh in the same instant."""
    return min(2.0, max(0.0, left_s) / 20) * chance
