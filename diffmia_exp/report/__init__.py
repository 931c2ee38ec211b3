"""Run folders -> one HTML page, or a Markdown, CSV or LaTeX table.

`collect.py` reads what is there and says what cannot be read, `groups.py` puts together what may be compared, `evidence.py` computes
what follows from several score tables, `figures.py` draws, `page.py` and `tables.py` write.
"""
