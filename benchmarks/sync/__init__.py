"""Processes in lock step: pushpull and training steps of ``dist_sync`` beside MXNet, Gloo, MPI and DDP."""
