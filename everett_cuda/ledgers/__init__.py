"""The ledger of a run: what its bits came from, written as it goes, chained, signed, and checked offline; never a key.

Not called `ledger`: a module of that name would take the place of the function `ev.ledger`.
"""
