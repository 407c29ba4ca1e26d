"""How far routed attention is from dense attention: on texts (`nll`) and in finding facts (`needles`).

`hga eval` is the public face; benchmarks use the parts.
"""
