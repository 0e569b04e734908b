"""Pretraining and annealing on the Trainer of transformers, with what a long run needs to be trusted.

* run.py          pretrain, and train_run, which both verbs share: the steps of a run in their order
* anneal.py       anneal: the tail of a trunk, as a run of its own
* average.py      average: a finished model from a trunk's last checkpoints
* start.py        Start, RunData: what a run begins with, its first record, the preview of its schedule, its data
* dry_run.py      dry_run: a training of one number before the data are touched
* resume.py       which checkpoint a run goes on from, and what may be another in it now
* trainer.py      PowerTrainer: the stock Trainer with tokens in its logs
* course.py       OnCourse: the loss beside the recipe's forecast
* record.py       RunRecord, TokenProgress, ExpertLoad: run.json, the progress bar, the load of the experts
* bad_numbers.py  BadNumbers, NonFiniteError: steps that are not finite
* stops.py        StopOnSignal, full_disk_told: SIGTERM and SIGINT, and a disk that fills up
* speed.py        speed_up_: faster steps that compute the same
"""
