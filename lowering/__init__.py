"""How sparse attention runs: the index format, the ops, and the kernels generated for them.

index.py: the format that all patterns speak. inputs.py: what attention and estimators are given.
ops.py: the ops of rewritten graphs. estimators.py: the estimators that patterns use. device.py and
dispatch.py: what a lowering is, and which one serves. reference/: what all of them mean, in plain
torch. cpu/, triton/: generated kernels. Knows neither patterns nor FX.
"""
