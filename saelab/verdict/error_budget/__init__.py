"""Error budget of a study: the levels of its comparisons, and the ledger of what each cost."""
