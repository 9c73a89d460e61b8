"""What only the leading replica does: make the first authority, follow a given issuer, renew its own, publish the bundle, rotate.

Decides when to do these; how is `shared`'s, `anchors`' and `bundle`'s. Everything here may run on two replicas for an instant without
harm: state is written by version, bundles are written from state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from core.k8s.api import Api
from core.k8s.errors import ApiError
from core.names import WorkloadId
from core.runtime import logs
from identity.admin import answer_of, read_ask
from identity.admin_wire import Answer, Ask
from identity.authority import Authority
from identity.bundle import Refusal, Step, due_step
from identity.cluster.anchors import Publisher
from identity.cluster.census import Replica, merged, obstacles
from identity.cluster.given import GivenSecret, Tell, differs
from identity.cluster.peers import Peers
from identity.cluster.pods import list_pods
from identity.cluster.shared import LOOK_EVERY_S, Shared, Superseded
from identity.ledger import Ledger
from identity.wire import Known

_TEND_EVERY_S = 30.0
_WAIT_S = 5.0  # between two looks at whether the next step of a given issuer is safe

_DONE = {
    Step.ADD: "TrustAnchorAdded",
    Step.SWITCH: "IssuerSwitched",
    Step.DROP: "TrustAnchorDropped",
    Step.ABORT: "TrustAnchorTakenBack",
}
"""The reason of the Event: one each, because equal ones become a count on the first."""

log = logs.logger("identity")


class Leader:
    """The duties, for as long as `run` runs. given: the Secret that gives the issuer, None when we make our own."""

    def __init__(
        self, api: Api, shared: Shared, peers: Peers, ours: WorkloadId, given: GivenSecret | None, known: Callable[[], Known], tell: Tell
    ) -> None:
        self.publisher = Publisher(api)
        self.waits_for: tuple[str, ...] = ()
        """What the next step towards a given issuer waits for."""
        self._api = api
        self._shared = shared
        self._peers = peers
        self._ours = ours
        self._given = given
        self._known = known
        self._tell = tell

    async def run(self) -> None:
        """For ever; cancel when leadership ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish)
            nursery.start_soon(self._keep, self._tend if self._given is None else self._follow_given)

    async def _publish(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.publisher.run)
            authority = await self._shared.authority.wait_for(lambda value: value is not None)
            assert authority is not None
            version = -1
            while True:
                version = await authority.trust.wait_newer(version)
                self.publisher.want(authority.trust.value.bundle_pem)

    async def _keep(self, duty: Callable[[], Awaitable[float]]) -> None:
        while True:
            pause = LOOK_EVERY_S
            try:
                pause = await duty()
            except (ApiError, trio.TooSlowError, Superseded) as error:
                log.warning("duty of the leader failed, will be tried again", reason=str(error) or type(error).__name__)
            await trio.sleep(pause)

    async def _tend(self) -> float:
        """Fill an empty Secret; renew our own issuer in time."""
        shared = self._shared
        if shared.vacant:
            trust_domain = self._ours.trust_domain
            await shared.begin(lambda store: Authority.self_made(trust_domain, store))
            self._tell("Normal", "IssuerStored", f"Secret {shared.where} was empty and holds the issuer now")
        if shared.authority.value is None:
            return LOOK_EVERY_S
        before = shared.authority.value.issuer.ref.id
        await shared.change(_tended)
        if shared.authority.value.issuer.ref.id != before:
            self._tell("Normal", "IssuerRenewed", "the issuer below the same trust anchor was renewed")
        return LOOK_EVERY_S if shared.vacant else _TEND_EVERY_S

    # --- an issuer that others give ------------------------------------------------------------------------------------------

    async def _follow_given(self) -> float:
        assert self._given is not None, "run"
        shared = self._shared
        found = await self._given.read()
        if shared.vacant:
            await self._given.begin(shared)
        authority = shared.authority.value
        if found is None or authority is None:
            return LOOK_EVERY_S
        issuer, anchors = found
        if due_step(authority.trust.value) is Step.ADD and not differs(authority, issuer, anchors):
            self.waits_for = ()
            return LOOK_EVERY_S
        before = authority.trust.value
        ledger, in_the_way = await self.census()
        waits_for = tuple(await shared.change(lambda trial: trial.converge(issuer, anchors), ledger, in_the_way))
        after = authority.trust.value
        if after != before:
            note = f"bundle generation {after.generation}, issuer {after.issuer.id}, as {self._given.where} gives it"
            self._tell("Normal", "TrustChanged", note)
        if waits_for and waits_for != self.waits_for:
            log.warning("the next step towards the given issuer waits", count=len(waits_for), first="; ".join(waits_for[:5]))
        self.waits_for = waits_for
        return _WAIT_S if waits_for else LOOK_EVERY_S

    # --- rotation ------------------------------------------------------------------------------------------------------------

    async def census(self, *, ignore_absent: bool = False) -> tuple[Ledger, tuple[str, ...]]:
        """Who holds what in the whole cluster, and what else is in the way of the next step. Raises ApiError, Superseded."""
        authority = self._shared.authority.value
        if authority is None:
            raise Superseded(self._shared.problem)
        trust, mine = authority.trust.value, self._known()
        others = await self._peers.ask(trust.bundle_pem)
        # Pods after ledgers: whoever is in a ledger and not in this list has been deleted.
        pods = await list_pods(self._api, self._ours)
        me = Replica("that leads", mine.generation, mine.issuer, mine.up_s, mine.holdings)
        ledger = merged((me, *others), pods)
        in_the_way = obstacles(
            trust,
            (me, *others),
            ledger,
            pods,
            unpublished=self.publisher.unpublished(),
            ignore_absent=ignore_absent,
            now=authority.clock(),
        )
        return ledger, in_the_way

    async def answer(self, line: bytes) -> Answer:
        """What one request of an operator gets."""
        try:
            ask = read_ask(line)
            return await self._answered(ask)
        except ValueError as error:
            return Answer(str(error))
        except Superseded as error:
            return Answer(str(error), again=True)
        except (ApiError, trio.TooSlowError) as error:
            sentence = f"the API server does not answer, nothing is known to be done: {error}; look at the status and try again"
            return Answer(sentence, again=True)

    async def _answered(self, ask: Ask) -> Answer:
        ledger, in_the_way = await self.census(ignore_absent=ask.ignore_absent)
        if ask.verb == "status":
            return answer_of(self._shared.view(ledger, in_the_way))

        def work(trial: Authority) -> tuple[Step, Refusal | None]:
            step = Step(ask.step) if ask.step else due_step(trial.trust.value)
            if self._given is not None and step in (Step.ADD, Step.ABORT):
                return step, Refusal(f"the issuer is given: change {self._given.where}, the steps that are safe follow by themselves")
            return step, trial.rotate(step, ignore_absent=ask.ignore_absent, force=ask.force)

        step, refusal = await self._shared.change(work, ledger, in_the_way)
        if refusal is None:
            generation = self._shared.view(ledger, ()).trust.value.generation
            log.warning("rotation step done", step=step.value, forced=ask.force, generation=generation)
            self._tell("Normal", _DONE[step], f"step {step.value} of a rotation is done, bundle generation {generation}")
            in_the_way = (await self.census(ignore_absent=ask.ignore_absent))[1]
        else:
            log.warning("rotation step refused", step=step.value, reason=refusal.sentence)
        return answer_of(self._shared.view(ledger, in_the_way), step, refusal)


def _tended(trial: Authority) -> None:
    trial.keep_none()
    trial.renew_issuer()
