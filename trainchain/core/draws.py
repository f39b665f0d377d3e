"""Which shards are audited, and which segment of each. Nobody can foresee a draw, and everybody can repeat it.

A round opens with the signed hash of a secret. The draw of a contribution is HMAC-SHA256(secret, lease | state root),
made once root and delta are durable; the secret is published when no draw can use it any more.
"""

import hashlib
import hmac
from fractions import Fraction

LEAST = Fraction(3, 20)
"""The smallest probability of an audit."""
AT_RISK = Fraction(3, 2)
"""Over the shards at risk it is the probability: whoever forges a share f of a shard gains f c and loses f p times
what has not vested, so that this factor is the margin at a cost c of a shard's whole pay."""
SECRET_BYTES = 32
MANY = 20
"""So many wallets that have earned to audit in a job would be asked before owner and operator for sure, but for these
being first in half of the audits at least."""


def secret_hash(secret: bytes) -> str:
    """What a round opens with: 0x and 64 hex digits. Raises ValueError unless the secret has 32 bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a round's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return "0x" + hashlib.sha256(b"\x02" + secret).hexdigest()


def probability(at_risk: int) -> Fraction:
    """Of an audit, by how many shards of the wallet in this job have not vested, this one included: from 1 on."""
    if at_risk < 1:
        raise ValueError("the shard itself is at risk")
    return min(Fraction(1), max(LEAST, AT_RISK / at_risk))


def draw(secret: bytes, lease: bytes, root: bytes, *, at_risk: int, steps: int, segment_steps: int) -> int | None:
    """The segment of a contribution that is replayed, from 0 on; None where it is not audited.

    A step is drawn, and the segment it is in is replayed: a short last segment is drawn as seldom as it is little work.

    `lease` and `root` (of its states) have 32 bytes each. Raises ValueError for others, and without steps.
    """
    if len(secret) != SECRET_BYTES or len(lease) != 32 or len(root) != 32:
        raise ValueError("secret, lease and root have 32 bytes each")
    if steps < 1 or segment_steps < 1:
        raise ValueError("a shard has a step, and so has a segment")
    drawn = hmac.new(secret, lease + root, hashlib.sha256).digest()
    chance, place = int.from_bytes(drawn[:16], "big"), int.from_bytes(drawn[16:], "big")
    if chance * probability(at_risk).denominator >= probability(at_risk).numerator << 128:
        return None
    return place % steps // segment_steps


def turn(secret: bytes, lease: bytes, wallet: str) -> bytes:
    """A wallet's place among those who may audit this contribution: the lowest comes first."""
    return hmac.new(secret, b"auditor" + lease + bytes.fromhex(wallet[2:]), hashlib.sha256).digest()


def trusted_first(secret: bytes, lease: bytes, others: int) -> bool:
    """Whether owner and operator are asked before the `others` who have earned to audit this contribution: of few
    others, who may all be a cheat's friends, nearly always; every second time from half of `MANY` on, so that friends
    alone cannot make forging pay."""
    drawn = hmac.new(secret, b"trusted" + lease, hashlib.sha256).digest()
    return int.from_bytes(drawn[:8], "big") * MANY < max(MANY // 2, MANY - others) << 64
