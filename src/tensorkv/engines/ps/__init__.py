"""Engine dist_async: parameter servers, on Ray."""
