"""The public Python API: the verbs of the command line as functions, and the requests that they take.

It may import everything below the command line. A new verb is one function in `verbs.py`, its name in
`compress/__init__.py` and, where people type it, a command in `cli/main.py`.
"""
