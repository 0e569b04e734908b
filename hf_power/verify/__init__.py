"""The check before a big run: is muP right, and is the recipe's learning rate the best one at a cell it has not seen?

check.py  the runs at the cell, and what is written of them: verify
page.py   regret and verdict of the runs, the page as JSON and as text: Page, judge, page_text
picture.py  the picture of the page: plot_verify
"""
