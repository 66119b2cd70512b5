"""How sparse attention runs: the index format, the ops, and the kernels generated for them.

index.py: the format that all patterns speak. ops.py: the ops of rewritten graphs. reference.py and
estimate.py: what they mean, in plain torch. cpu/, triton/: generated kernels. Knows neither
patterns nor FX.
"""
