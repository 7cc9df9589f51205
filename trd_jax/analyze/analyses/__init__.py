"""The analyses: a file each, with its `ANALYSIS`; `analysis.registry` finds it.

To add one, add its file: nothing else names it.
"""
