"""``python -m hf_power.run SCRIPT | -m MODULE | COMMAND``: code that does not import hf_power has lr_scheduler_type="power".

* `__main__`: runs the script, module or command; the Python processes that it starts have the schedule too
* `site/sitecustomize.py`: what each of those processes imports first
"""
