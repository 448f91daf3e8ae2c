"""Move bytes between processes: sockets, shared memory, rendezvous."""
