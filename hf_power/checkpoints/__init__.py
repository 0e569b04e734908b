"""Checkpoints that can be trusted: sealed by a manifest, verified before use, the newest intact one found.

* seal.py      seal, problems, newest_intact, rotate: the manifest of a checkpoint; examine: what a run can resume from
* callback.py  SealCheckpoints: the Trainer's callback that seals and rotates
* average.py   shares, merge: the mean of several checkpoints' weights
* ema.py       AverageWeights: the Trainer's callback that keeps a mean in training
* older.py     add_older_names: a saved model under the names that transformers 4.56 and 4.57 read
* locate.py    find_model, weights_sha256: a model by its name, in a folder or on the Hub
"""
