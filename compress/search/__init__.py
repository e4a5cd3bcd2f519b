"""Search for a plan: exact knapsack, evolutionary search, and the closed loop over measured time.

It imports the vocabulary, `methods` and `sites`; `knapsack` and `closed_loop` stay free of torch. Add here
whatever chooses between options from their costs and losses; measuring costs belongs to `cost` and `measure`.
"""
