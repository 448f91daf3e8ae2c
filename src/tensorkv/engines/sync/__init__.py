"""Engine dist_sync: workers in lock step, on torch.distributed."""
