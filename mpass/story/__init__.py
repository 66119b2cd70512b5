"""The story of a model: one report of all its graphs.

A model is compiled to several graphs: its prefill, its decoding step, later chunks, and the parts
between graph breaks. `mpass.reports()` has a report for each, and `mpass.last_report()` one of the
model: what became of every attention, and what was never compiled.
"""
