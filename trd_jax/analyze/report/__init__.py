"""The report: one page that shows what happened, opened from the disk.

`write` makes it. `page` puts it together of the run's card (`card`), of what
analyses found (`sections`) and of the inspector, whose list lies in the page
(`catalogue`) and whose texts lie in pieces beside it (`pieces`, `details`,
`token_scores`). What models and data sets wrote goes through `escaping`.
"""

from trd_jax.analyze.report.page import write

__all__ = ["write"]
