"""Python's recursion limit, put back after imports that raise it."""

import sys

LIMIT = 1000


def restore_limit() -> None:
    """Call this after importing web3, eth_account, eth_keyfile or py-evm.

    They (py_ecc, in the end) set the limit to 100,000 for the whole process. At that, a stranger's JSON of nothing
    but opening brackets overflows the C stack: the process is gone instead of refusing the text.
    """
    if sys.getrecursionlimit() > LIMIT:
        sys.setrecursionlimit(LIMIT)
