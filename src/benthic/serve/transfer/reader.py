"""A reader's side: greets owners, keeps leases alive, copies what the scheduler planned, and asks if it held.

Nothing here waits: every call does what can be done now. An owner that does not answer within `patience_s`
is given up for the transfers that wait for it, which then fail and are computed instead.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import zmq

from benthic.errors import TransferError
from benthic.serve.transfer.handshake import Check, Done, FromDesk, Greet, Held, Refuse, Renew, Welcome

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from benthic.sched.plans import TransferPlan
    from benthic.serve.messages import Remote
    from benthic.serve.transfer.handshake import Terms
    from benthic.serve.transfer.memory import Copy, Opener, Source

logger = logging.getLogger("benthic.serve.transfer")


@dataclass(eq=False)
class Owner:
    """One other instance: its socket, and its pages once it has welcomed this one.

    `hang_up` is readable when the connection has ended.
    """

    socket: zmq.Socket
    hang_up: zmq.Socket
    instance_id: str
    greeted_s: float
    num_blocks: int = 0
    source: Source | None = None
    trouble: str | None = None


@dataclass(eq=False)
class Incoming:
    """One request's blocks: transfers to copy, those on their way, those copied and not confirmed.

    Of an early pull, the first `asked` of those copied are confirmed at a time.
    """

    remote: Remote
    owner: Owner
    waiting: list[TransferPlan] = field(default_factory=list)
    copying: list[tuple[TransferPlan, Copy]] = field(default_factory=list)
    copied: list[TransferPlan] = field(default_factory=list)
    asked_s: float | None = None
    verdict: bool | None = None
    early: bool = False
    asked: int = 0

    @property
    def busy(self) -> bool:
        """Whether blocks are on their way, or an answer about them."""
        return bool(self.waiting or self.copying or self.asked_s is not None)


class Reader:
    """Everything that one instance is reading from others.

    Args:
        terms: this instance's.
        pages: this instance's, into which blocks are copied, and which opens an owner's.
        lease_s: how long an owner keeps blocks without a renewal; renewals go out four times as often.
        patience_s: how long an answer may take.
    """

    def __init__(self, terms: Terms, pages: Opener, *, lease_s: float, patience_s: float) -> None:
        self._terms = terms
        self._pages = pages
        self._renew_s = lease_s / 4
        self._patience_s = patience_s
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._owners: dict[str, Owner] = {}
        self._replaced: list[Owner] = []
        self._incoming: dict[str, Incoming] = {}
        self._renewed_s = 0.0
        self._decode = msgspec.msgpack.Decoder(FromDesk).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self.copied_blocks = 0

    @property
    def waiting(self) -> bool:
        """Whether an answer is due, or blocks are on their way."""
        return any(each.busy for each in self._incoming.values())

    @property
    def pulling(self) -> bool:
        """Whether either is so of a pull for which a request waits: not of early ones."""
        return any(each.busy and not each.early for each in self._incoming.values())

    def expect(self, request_id: str, remote: Remote, now: float, *, early: bool = False) -> None:
        """A request came whose blocks another instance holds: greet it, and keep the lease from now on.

        What is pulled `early` is lent until its owner says otherwise.
        """
        owner = self._meet(remote, now)
        self._incoming[request_id] = Incoming(remote, owner, early=early)
        if not early:
            self._send(owner, Renew((remote.lease_id,)))

    def keep_early(self, wanted: Container[str]) -> None:
        """Forget every early pull that is not wanted any more; none of its transfers is under way."""
        for request_id, each in list(self._incoming.items()):
            if each.early and request_id not in wanted:
                del self._incoming[request_id]

    def forget(self, request_id: str) -> list[TransferPlan]:
        """The request needs nothing (more): let its lease go; returns transfers that did not end.

        Waits for those on their way, for their blocks may be given to others next.
        """
        each = self._incoming.pop(request_id, None)
        if each is None:
            return []
        for _, copy in each.copying:
            copy.wait()
        if each.asked_s is None and not each.early:
            self._send(each.owner, Done(each.remote.lease_id))
        return [*each.copied, *(plan for plan, _ in each.copying), *each.waiting]

    def take(self, plans: Iterable[TransferPlan]) -> list[TransferPlan]:
        """Accept transfers that the scheduler planned; returns those of requests given up already."""
        stray = []
        for plan in plans:
            each = self._incoming.get(plan.request_id)
            if each is None:
                stray.append(plan)
            else:
                each.waiting.append(plan)
        return stray

    def advance(self, now: float) -> list[tuple[TransferPlan, bool]]:
        """Take answers, copy, ask; returns transfers that came to an end, and whether they brought data."""
        self._receive()
        self._renew(now)
        ended: list[tuple[TransferPlan, bool]] = []
        for request_id, each in list(self._incoming.items()):
            trouble = self._trouble(each, now) or self._copy(each, now)
            if trouble is not None and each.early:
                logger.info("%s: %s; it is pulled at its end", request_id, trouble)
            elif trouble is not None:
                logger.warning("%s: %s; the prompt is computed here", request_id, trouble)
            if each.early and trouble is None:
                ended += [(plan, True) for plan in self._confirmed(each, now)]
            elif trouble is not None or each.verdict is not None:
                ended += [(plan, trouble is None) for plan in self.forget(request_id)]
        self._let_go()
        return ended

    def wait(self, seconds: float) -> None:
        """Sleep until blocks have come or, where none are on their way, an owner says something.

        For the latter at most so many seconds.
        """
        for each in self._incoming.values():
            if each.copying:
                each.copying[0][1].wait()
                return
        self._poller.poll(int(seconds * 1000))

    def shut(self) -> None:
        """Close every connection."""
        for owner in self._owners.values():
            self._part(owner)
        self._context.destroy(linger=0)

    def _meet(self, remote: Remote, now: float) -> Owner:
        known = self._owners.get(remote.address)
        if known is not None and known.instance_id == remote.instance_id and known.trouble is None:
            return known
        if known is not None:  # another life of the process at that address, or one that failed before
            known.trouble = known.trouble or f"instance {known.instance_id} is gone from {remote.address}"
            self._replaced.append(known)
            self._part(known)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        owner = Owner(socket, socket.get_monitor_socket(zmq.EVENT_DISCONNECTED), remote.instance_id, now)
        for each in (owner.socket, owner.hang_up):
            self._poller.register(each, zmq.POLLIN)
        try:
            socket.connect(remote.address)
        except zmq.ZMQError as error:
            owner.trouble = f"instance {owner.instance_id} cannot be called: {error}"
            self._part(owner)
            return owner
        self._owners[remote.address] = owner
        self._send(owner, Greet(self._terms))
        return owner

    def _let_go(self) -> None:
        """Let pages and sockets go that nobody uses any more, because something is wrong with their owner."""
        for owner in (*self._owners.values(), *self._replaced):
            if owner.trouble is not None and owner.source is not None:
                owner.source = None
                self._pages.close(owner.instance_id)
        self._replaced.clear()
        used = [each.owner for each in self._incoming.values()]
        for address, owner in list(self._owners.items()):
            if owner.trouble is not None and owner not in used:
                del self._owners[address]
                self._part(owner)

    def _part(self, owner: Owner) -> None:
        for each in (owner.socket, owner.hang_up):
            self._poller.unregister(each)
        owner.socket.disable_monitor()
        owner.hang_up.close(linger=0)
        owner.socket.close(linger=0)

    def _send(self, owner: Owner, message: Greet | Renew | Check | Done) -> None:
        if not owner.socket.closed:
            owner.socket.send(self._encode(message), zmq.NOBLOCK)

    def _receive(self) -> None:
        ready = {socket for socket, _ in self._poller.poll(0)}
        for owner in self._owners.values():
            while owner.socket in ready and owner.socket.poll(0):
                self._hear(owner, self._decode(owner.socket.recv()))
            if owner.hang_up in ready:
                owner.hang_up.recv_multipart()
                owner.trouble = f"the connection to instance {owner.instance_id} has ended"

    def _hear(self, owner: Owner, answer: FromDesk) -> None:
        if isinstance(answer, Held):
            for each in self._incoming.values():
                if each.owner is owner and each.remote.lease_id == answer.lease_id:
                    each.verdict = answer.valid
        elif isinstance(answer, Refuse):
            owner.trouble = f"the other instance refuses: {answer.reason}"
        else:
            self._enter(owner, answer)

    def _enter(self, owner: Owner, welcome: Welcome) -> None:
        if welcome.instance_id != owner.instance_id:
            owner.trouble = (
                f"instance {owner.instance_id} is gone; {welcome.instance_id} has taken its address"
            )
            return
        try:
            owner.source = self._pages.open(welcome.instance_id, welcome.regions)
            owner.num_blocks = min(region.num_blocks for region in welcome.regions)
        except TransferError as error:
            owner.trouble = str(error)

    def _renew(self, now: float) -> None:
        if now - self._renewed_s < self._renew_s:
            return
        self._renewed_s = now
        wanted: dict[int, tuple[Owner, list[str]]] = {}
        for each in self._incoming.values():
            if each.asked_s is None and not each.early:
                wanted.setdefault(id(each.owner), (each.owner, []))[1].append(each.remote.lease_id)
        for owner, lease_ids in wanted.values():
            self._send(owner, Renew(tuple(lease_ids)))

    def _trouble(self, each: Incoming, now: float) -> str | None:
        if not each.waiting and not each.copying and not each.copied:
            return None
        owner = each.owner
        if each.verdict is True:
            return None
        if owner.trouble is not None:
            return owner.trouble
        if each.verdict is False:
            return f"the lease {each.remote.lease_id!r} ended before it was read"
        since = owner.greeted_s if owner.source is None else each.asked_s
        if since is not None and now - since > self._patience_s:
            owner.trouble = f"instance {owner.instance_id} has not answered for {now - since:.1f} s"
            return owner.trouble
        return None

    def _copy(self, each: Incoming, now: float) -> str | None:
        """Start what waits, take what came; after the last transfer, ask whether the lease still holds."""
        source = each.owner.source
        if source is None:
            return None
        try:
            while each.waiting:
                plan = each.waiting[0]
                blocks = each.remote.blocks[plan.first : plan.first + len(plan.blocks)]
                if len(blocks) != len(plan.blocks):
                    return f"the lease holds {len(each.remote.blocks)} blocks, but the prompt needs more"
                if not 0 <= min(blocks) <= max(blocks) < each.owner.num_blocks:
                    return f"the lease names blocks {blocks}, but there are {each.owner.num_blocks} there"
                each.copying.append((plan, source.start(blocks, plan.blocks)))
                each.waiting.pop(0)
            while each.copying and each.copying[0][1].ended():
                plan, _ = each.copying.pop(0)
                self._arrived(each, plan, now)
        except TransferError as error:
            each.owner.trouble = str(error)
        return each.owner.trouble

    def _arrived(self, each: Incoming, plan: TransferPlan, now: float) -> None:
        self.copied_blocks += len(plan.blocks)
        each.copied.append(plan)
        if plan.last:
            each.asked_s = now
            self._send(each.owner, Done(each.remote.lease_id))

    def _confirmed(self, each: Incoming, now: float) -> list[TransferPlan]:
        """What an early pull has for certain; asks about what came since."""
        confirmed = []
        if each.verdict is not None:
            confirmed, each.copied = each.copied[: each.asked], each.copied[each.asked :]
            each.asked_s = each.verdict = None
        if each.copied and each.asked_s is None:
            each.asked_s, each.asked = now, len(each.copied)
            self._send(each.owner, Check(each.remote.lease_id))
        return confirmed
