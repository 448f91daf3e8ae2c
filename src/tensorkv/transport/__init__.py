"""Between processes: wire format, shared memory, rendezvous."""
