"""What an attention mask means, proven from the sub-graph that builds it.

prover.py is the entrance: it reads a mask as a condition on (b, h, q, k) with reader.py and the
rules, splits it at its `and`s, and classifies these with conjuncts.py.
"""
