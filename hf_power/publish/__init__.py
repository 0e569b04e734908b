"""The model card, and the push of a run to the Hub.

card.py       `make_card`, `write_card`: the card as a pure function of the files of a folder; its header, `card_data`.
sources.py    `read_sources`: those files, as records and as `Facts`; what may leave this machine, under which name: texts
              that cannot break Markdown or tell a path, `branch_name`, `link_files`, `link_checkpoint`.
templates/    the template of the card.
push.py       `publish`: the verb; `report_text` of what came of it; `PushGuard`: the same beside a training.
publisher.py  `Publisher`, `PushOptions`: what waits in RUN/.push, and its way to the Hub.
remote.py     a repository: `open_repository`, `mirror`, `with_patience`, `explain`.
"""
