"""What is written beside a run, and how it is read again.

errors: `UserError` and its kinds, `refused_by`; whose fault an error is.
schema: `decode` and `encode`, between JSON and dataclasses; `Json`, and types with a range such as `Count`.
files: `Record`, `read_record`, `read_object`, `write_json`; files that are there whole or not at all, hashes, a folder's lock.
machine: what makes a CPU fast, versions and hardware.
run: `Run` (run.json), and what several records share, such as `Data` and `Sections`.
rows: `Row` (sweep.jsonl). sweep: `Sweep`, all rows of one. results: `Evaluation` (eval.json), `Export` (export.json), `Push` (push.json).
summary: `Summarized`, a result that prints as a sentence; `frame_of`, records as a pandas frame.
exports: `lazily`, public names that are loaded when they are asked for.
"""
