"""Test kit of the KVarN packages: inputs, page tables, comparisons and an independent encoder.

Needs the ``testing`` extra (pytest, hypothesis, numpy). Nothing here is imported by the library.
"""
