"""What two instances tell each other, and when they refuse to share blocks.

All of it goes through the owner's desk. A reader greets once, renews the leases of requests that wait, reads
the owner's memory without its help, and then asks whether the lease held until then.
"""

from __future__ import annotations

import msgspec


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal on both sides for a block to mean the same.

    `model` is a digest of configuration and weights; `layout` names the order of a block's dimensions.
    """

    version: str
    model: str
    layers: int
    latent_dim: int
    block_size: int
    dtype: str
    layout: str = "layer, block, token, latent + rope"


def disagreements(reader: Terms, owner: Terms) -> str:
    """Every term that differs, with both values; empty when the two may share blocks."""
    pairs = [(name, getattr(reader, name), getattr(owner, name)) for name in Terms.__struct_fields__]
    return "; ".join(
        [f"{name} is {mine!r} here and {theirs!r} there" for name, mine, theirs in pairs if mine != theirs]
    )


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """Where an owner's pages are, for the implementation of the transfer that `kind` names.

    `handle` is its own business (process and descriptor, an IPC handle, agent metadata).
    """

    kind: str
    num_blocks: int
    handle: bytes


class Greet(msgspec.Struct, frozen=True, tag=True):
    """A reader introduces itself; answered by `Welcome` or `Refuse`."""

    terms: Terms


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The owner's pages on each of its ranks, and the id of this life of its process.

    Latents are the same on every rank, so a reader takes whichever it likes.
    """

    instance_id: str
    regions: tuple[Region, ...]


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """The two cannot share blocks."""

    reason: str


class Renew(msgspec.Struct, frozen=True, tag=True):
    """The reader still wants these leases; not answered."""

    lease_ids: tuple[str, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    """The reader has read all it wants of a lease, which ends; answered by `Held`."""

    lease_id: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """The reader has read something of a lease, which goes on; answered by `Held`."""

    lease_id: str


class Held(msgspec.Struct, frozen=True, tag=True):
    """Whether the lease held until its `Done` or `Check`: if not, what was read may be somebody else's."""

    lease_id: str
    valid: bool


ToDesk = Greet | Renew | Check | Done
FromDesk = Welcome | Refuse | Held
