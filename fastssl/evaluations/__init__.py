"""Evaluations: files that say what a trained backbone is good for, each a command of evaluate.py.

A file here, named in `fastssl.evaluate.WHAT`, offers
    HELP: str             one line, for --help
    Options               a frozen dataclass: the section of the command's own name
                          (`knn.neighbours=[1,5]`)
    evaluate(task, options) -> Table
                          of one RUN, on all processes alike; each gives back the same table, or
                          any but the first an empty one. `fastssl.evaluation_task` says what a Task
                          offers: the backbone, its labelled splits, their features, the journal.
One that trains what it evaluates is named in `fastssl.evaluate.TAKE_A_RECIPE` too, and offers, in
the place of evaluate, command(arguments) -> (exit code, Table or None): the whole command line.
A user's mistake is a ValueError, before features are extracted where possible. Packages that are
extras are imported inside functions, so that `evaluate.py --help` needs none of them. Only the
first process writes files.
"""
