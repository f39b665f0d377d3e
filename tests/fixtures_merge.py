"""How jobs of tests merge, where they say nothing else: the mean of what comes in, as it came."""

from trainchain.core.models import Check, Merge

PLAIN_MERGE = Merge(
    method="product-mean",
    rule="none",
    encoding="fp32",
    moments="fresh",
    outer_learning_rate=1.0,
    outer_momentum=0.0,
    spares=0.0,
    leave_one_out=None,
)

UNCHECKED = Check(auditors="none", answer=3600, timeout=1800, before_merge=0, spend=0.1)
"""And nobody audits them."""
