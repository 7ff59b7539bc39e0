"""Training from clicks: ratings that visitors give become new versions of the model that is served.

The trainer is `tdm-serve finetune tdm-r1 --feedback ...` as a process of its own, at the lowest priority and with its
own number of threads; nothing of it is imported here. `table` remembers what was trained, `material` says which ratings
are of use, `child` and `process` are the process, and `trainer` decides when it runs and brings its result into the
engine.
"""
