"""mpass inside of engines that run a model themselves: an attention for each of them.

- `transformers_attention.py` is an attention for transformers, `attn_implementation="minference"`.
- `packed_attention.py` serves the packed requests of transformers' continuous batching.
- `vllm/` is a plugin for vLLM, which makes long prefills sparse.

Everything here calls what `mpass.attend` calls. No engine is imported before it is used, and none
is needed to import this package.
"""
