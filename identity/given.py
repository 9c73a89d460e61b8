"""An issuer that an operator gives by files, watched: a Secret of type kubernetes.io/tls, mounted, or any three PEM files.

Reads the files again every few seconds and hands a changed set to the authority, which goes there step by step. It must not decide
the steps. Files that do not make a valid issuer change nothing: the last good one keeps signing, and the log says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509

from core.runtime import logs
from identity.authority import Authority
from identity.issuer import Issuer, IssuerInvalid, load_issuer

_LOOK_EVERY_S = 2.0  # polling: kubelet swaps a symlink, which inotify on the files never reports (Linkerd's issue 15109)
_FILE_MAX_BYTES = 64 * 1024

log = logs.logger("identity")


@dataclass(frozen=True)
class GivenFiles:
    """Where the issuer's certificate (with intermediates), its key and the trust anchors lie."""

    certificate: Path
    key: Path
    anchors: Path

    @classmethod
    def in_directory(cls, directory: Path) -> GivenFiles:
        """The layout of kubernetes.io/tls."""
        return cls(directory / "tls.crt", directory / "tls.key", directory / "ca.crt")

    def read(self, now: float) -> tuple[Issuer, list[x509.Certificate]]:
        """Raises IssuerInvalid naming the file or the rule."""
        contents = []
        for path in (self.certificate, self.key, self.anchors):
            try:
                contents.append(path.read_bytes()[:_FILE_MAX_BYTES])
            except OSError as error:
                raise IssuerInvalid(f"{path} cannot be read: {error.strerror}") from None
        if _mode(self.key) & 0o007:
            raise IssuerInvalid(f"{self.key} may be read by everybody: chmod o= {self.key} (for a Secret: defaultMode 0440 or less)")
        try:
            return load_issuer(contents[0], contents[1], contents[2], now)
        except IssuerInvalid as error:
            raise IssuerInvalid(f"{self.certificate.parent}: {error}") from None


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:  # swapped away since it was read
        raise IssuerInvalid(f"{path} cannot be read: {error.strerror}") from None


async def follow_files(files: GivenFiles, authority: Authority) -> None:
    """Run for ever."""
    issuer, anchors, said = authority.issuer, None, ""
    while True:
        waiting = ""
        try:
            issuer, anchors = files.read(authority.clock())
        except IssuerInvalid as error:
            waiting = f"the files are not used: {error}"
        try:
            blocking = _converge(authority, issuer, anchors) if anchors is not None else []
        except OSError as error:  # a full disk: what is not stored is not done, and tried again
            log.error("trust not changed", reason=str(error))
            blocking = []
        if blocking and not waiting:
            waiting = f"the next step waits for {len(blocking)} workload instance(s): {'; '.join(blocking[:5])}"
        if waiting and waiting != said:
            log.warning("issuer files", state=waiting)
        said = waiting
        await trio.sleep(_LOOK_EVERY_S)


def _converge(authority: Authority, issuer: Issuer, anchors: list[x509.Certificate]) -> list[str]:
    before = authority.trust.version
    blocking = authority.converge(issuer, anchors)
    if authority.trust.version != before:
        trust = authority.trust.value
        log.warning("trust changed", generation=trust.generation, issuer=trust.issuer.id, anchors=len(trust.anchors))
    return blocking
