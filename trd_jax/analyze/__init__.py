"""Looks at what happened: figures, tables and a report of finished runs.

`runs` reads workdirs, `analyses` makes figures and tables of them, a file each
(`analysis` has their types and finds them), `look` is how figures look,
`scoring` has per-token numbers made, and `report` is the page that shows all.
"""
