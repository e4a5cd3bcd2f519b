"""A compilation as one readable function (`compilation`), and its stages: whatever takes a `Job`.

It may import every room but `verbs` and `cli`. What works without a `Job` belongs in a library room; a new
stage is a module here that `compilation` calls, with its seconds counted by `Job.stages`.
"""
