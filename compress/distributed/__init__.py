"""Several processes: their environment, collective operations, and sharded parameters (FSDP2).

It imports torch.distributed, `tasks.task` and the vocabulary. Other rooms use these functions instead of
torch.distributed, so that an error in one process ends the command in all of them.
"""
