"""The benchmark: fused kernels against the libraries that users have now, across cardinalities.

``python -m bench`` runs it; ``python -m bench --help`` explains it; ``pytest --benchmark`` runs
its layers through pytest-benchmark. Read ``cases`` (what is measured), ``peers`` (against what),
``timing`` (how), ``sweep`` (one row, correctness first), ``report`` and ``plots`` (what is shown).
"""
