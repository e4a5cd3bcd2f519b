"""The command line: options and help, the terminal, exit codes, `doctor`.

It calls `compress.api.verbs` and nothing below it; beside that it may import what reads requests (`recipe`,
`request`) and formats results (`report`), and facts about this machine. A verb is one function in `main`, its
options stand in `options`; a new one is added to the list that `tests/cli/test_main.py` keeps.
"""
