"""Run folders -> one HTML page, or a Markdown, CSV or LaTeX table.

`collect.py` finds what is there and says what cannot be shown, `reading.py` reads one run, `settings.py` says what must be equal,
`groups.py` puts together what may be compared, `evidence.py` computes what follows from several score tables, `figures.py` and
`score_figures.py` describe the drawings of `drawing.py`, `sections.py` puts together what is said of a group; `page.py` and `tables.py`
write it, `logged.py` logs it to W&B.
"""
