"""Training on a cluster: the ranks of a Horovod job work on one global batch. Depends on `shared`
only.
"""
